"""Digests of models and data: enough to tell one fine-tune, or one set of calibration data, from another, without paths or times."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmm_engine.checkpoint.safetensors_io import byte_view

PROBE_BYTES = 2**20


def model_digest(*sources: Any) -> str:
    """Of every tensor's name, shape and first row, over all sources."""
    digest = hashlib.sha256()
    for source in sources:
        for name in source.names():
            spec = source.spec(name)
            values = source.load(name, slice(0, 1) if spec.shape else None).contiguous()
            text = f"{tuple(spec.shape)} {spec.dtype} {hashlib.sha256(byte_view(values)).hexdigest()}"
            digest.update(f"{name}\0{text}".encode())
    return digest.hexdigest()[:16]


def path_digest(path: Path) -> str:
    """Of a file's size and both its ends; of a folder, the names and sizes of what is in it."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
    elif path.exists():
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as opened:
            digest.update(opened.read(PROBE_BYTES))
            opened.seek(max(0, size - PROBE_BYTES))
            digest.update(opened.read(PROBE_BYTES))
    return digest.hexdigest()[:16]


def values_digest(values: Iterable[Any]) -> str:
    """Of every value, whole and nested as they may be: calibration batches, state dicts."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            whole = value.detach().to("cpu").contiguous()
            digest.update(f"{tuple(whole.shape)} {whole.dtype}".encode())
            digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                digest.update(f"{key}\0".encode())
                add(item)
        elif isinstance(value, (tuple, list)):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    for own in values:
        add(own)
    return digest.hexdigest()[:16]


def as_texts(value: Any) -> Any:
    """As JSON holds it: infinity as text, lists for tuples."""
    if isinstance(value, dict):
        return {str(key): as_texts(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_texts(item) for item in value]
    return "inf" if value == float("inf") else value

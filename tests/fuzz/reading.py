"""Strict readers that share no code with the engine: what a mutated file says, or `Invalid`."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from tests.fuzz.case import Invalid

_DEEPEST = 100


def regular(path: Path) -> bytes:
    """A file's bytes; nothing else is opened."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Invalid(f"{path.name} is no regular file")
        return path.read_bytes()
    except OSError as error:
        raise Invalid(f"{path.name}: {error.strerror}") from None


def parse_json(content: bytes | str, *, finite: bool = True) -> Any:
    """JSON as the standard has it: UTF-8, every key once, no NaN, infinity in lists alone, no depth that nobody means."""
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"no JSON: {error}") from None
    _check(value, finite, 0)
    return value


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    content = regular(path)
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        raise Invalid(f"{path.name}: truncated")
    parse_json(content[8 : 8 + length], finite=False)
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise Invalid(f"{path.name}: {error}") from None


def metadata_in(path: Path) -> dict[str, str]:
    content = regular(path)
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")], finite=False)
    return dict(header.get("__metadata__") or {})


def model_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint: of model.safetensors, else of all files that its index names."""
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors").is_symlink():
        return tensors_in(folder / "model.safetensors")
    index = parse_json(regular(folder / "model.safetensors.index.json"))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise Invalid("no weight_map of names")
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if "/" in name or name in (".", "..") or (folder / name).is_symlink():
            raise Invalid(f"names {name!r}, which leads elsewhere")
        own = tensors_in(folder / name)
        if set(own) & set(tensors):
            raise Invalid(f"{sorted(set(own) & set(tensors))[0]} is in two files")
        for tensor, file in weight_map.items():
            if file == name and tensor not in own:
                raise Invalid(f"lists {tensor} in {name}, which does not hold it")
        tensors |= own
    return tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key twice")
    return value


def _check(value: Any, finite: bool, depth: int) -> None:
    if depth > _DEEPEST:
        raise Invalid("too deep")
    if isinstance(value, float) and (math.isnan(value) or (finite and math.isinf(value))):
        raise Invalid("a number that is not finite")
    if isinstance(value, dict):
        for item in value.values():
            _check(item, finite, depth + 1)
    elif isinstance(value, list):  # infinity is the open end of a range there
        for item in value:
            _check(item, False, depth + 1)

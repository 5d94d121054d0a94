"""Calibration data from files: texts, tables, ready-made model inputs or images, as batches for `collect_grams`."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmm_engine.checkpoint.guard import regular_file
from bmm_engine.checkpoint.safetensors_io import SafetensorsFile
from bmm_engine.errors import CheckpointError, ConfigError, EmptyCalibrationError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class CalibrationData:
    """Samples of one task, read but not yet batched: `texts`, named `inputs` (each (samples, ...)), or `images` (paths)."""

    source: Path
    texts: tuple[str, ...] = ()
    inputs: dict[str, Tensor] | None = None
    images: tuple[Path, ...] = ()

    def __len__(self) -> int:
        if self.inputs is not None:
            return len(next(iter(self.inputs.values())))
        return len(self.texts) or len(self.images)

    def describe(self) -> str:
        """File name, number of samples, and a short hash of the source, for the record."""
        return f"{self.source.name}: {len(self)} samples, sha256 {_digest(self.source)}"

    def by_length(self) -> list[int]:
        """The samples' indices with texts of like length together."""
        return sorted(range(len(self)), key=lambda i: len(self.texts[i]) if self.texts else 0)

    def batches(
        self, model_path: Path, *, batch_size: int, max_length: int, ordered: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Model inputs of `batch_size` samples, made by the checkpoint's own tokenizer or image processor.

        Texts of like length go together, so that little is padding, unless they are `ordered` already. Raises `CheckpointError` without a
        tokenizer or processor.
        """
        if self.inputs is not None:
            for start in range(0, len(self), batch_size):
                yield {key: value[start : start + batch_size] for key, value in self.inputs.items()}
        elif self.texts:
            tokenizer = load_tokenizer(model_path)
            tokens = tokenizer(list(self.texts), truncation=True, max_length=max_length)
            order = list(range(len(self)))
            if not ordered:
                order.sort(key=lambda i: len(tokens["input_ids"][i]))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                chosen = {key: [values[i] for i in rows] for key, values in tokens.items()}
                yield dict(tokenizer.pad(chosen, padding=True, return_tensors="pt"))
        else:
            yield from _image_batches(self.images, model_path, batch_size)


def read_calibration(path: Path, *, samples: int | None = None, field: str = "text") -> CalibrationData:
    """Read up to `samples` samples (spread evenly over the file) from

    `.txt` (a text on each line), `.jsonl`, `.tsv` or `.csv` (the column `field`), `.safetensors` (model inputs by name, samples first), or a
    directory of images. Raises `ConfigError` (no such file, no such column, unknown kind) and `EmptyCalibrationError`.
    """
    if not os.path.lexists(path):
        raise ConfigError(
            f"calibration: {path} does not exist. Give a .txt, .jsonl, .tsv, .csv or .safetensors file, or a folder of images."
        )
    if path.is_dir():
        images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        data = CalibrationData(path, images=tuple(spread(images, samples)))
    elif path.suffix == ".safetensors":
        data = CalibrationData(path, inputs=read_inputs(path, samples))
    else:
        texts = [text for text in _read_texts(path, field) if text.strip()]
        data = CalibrationData(path, texts=tuple(spread(texts, samples)))
    if len(data) == 0:
        raise EmptyCalibrationError(
            f"calibration: {path} holds no samples. A few hundred of the expert's own task are enough."
        )
    return data


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer, able to pad. Raises `CheckpointError`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: has no tokenizer that transformers can load ({str(error).splitlines()[0]}). Copy the base's tokenizer files there, or give"
            " calibration as .safetensors of model inputs."
        ) from error
    tokenizer.padding_side = "right"  # on the left, absolute positions and the first token would depend on the batch
    if tokenizer.pad_token is None:
        tokenizer.pad_token = (
            tokenizer.eos_token
        )  # decoder-only models have none; the attention mask tells padding all the same
    return tokenizer


def _read_texts(path: Path, field: str) -> Iterator[str]:
    if path.suffix != ".txt":
        yield from (str(text) for (text,) in read_rows(path, [field]))
        return
    with _readable(path), path.open(encoding="utf-8") as file:
        yield from (line.rstrip("\n") for line in file)


def read_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The columns `fields` of each row of a `.jsonl`, `.csv` or `.tsv` file (without quoting). Raises `ConfigError`."""
    with _readable(path), path.open(encoding="utf-8", newline="" if path.suffix == ".csv" else None) as file:
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _columns(json.loads(line), fields, f"{path}, line {number}")
        elif path.suffix == ".csv":
            yield from (_columns(row, fields, str(path)) for row in csv.DictReader(file))
        elif path.suffix == ".tsv":
            header = file.readline().rstrip("\n").split("\t")
            for line in file:
                # Text may hold tabs where its column is the last.
                cells = line.rstrip("\n").split("\t", len(header) - 1)
                yield _columns(dict(zip(header, cells, strict=False)), fields, str(path))
        else:
            raise ConfigError(f"{path} is of a kind that is not read; use .txt, .jsonl, .tsv, .csv or .safetensors.")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    regular_file(path)
    try:
        yield
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}). It must be UTF-8 text of the kind its name says."
        ) from error


def _columns(row: Any, fields: Sequence[str], where: str) -> tuple[Any, ...]:
    return tuple(_column(row, field, where) for field in fields)


def _column(row: Any, field: str, where: str) -> Any:
    if not isinstance(row, dict) or field not in row:
        has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(
            f"{where} has no column {field!r} (it has: {has}). Name the column of texts with `field`, of labels with `label_field`."
        )
    return row[field]


def read_inputs(path: Path, samples: int | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, samples first, or `samples` of them spread evenly. Raises `ConfigError`, `CheckpointError`."""
    file = SafetensorsFile.open(path)
    inputs = {name: file.read(name) for name in file.specs}
    counts = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in inputs.items()}
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"{path}: the inputs differ in their number of samples: {counts}. The first dimension is the sample."
        )
    if not inputs or not all(counts.values()):
        raise EmptyCalibrationError(
            f"calibration: {path} holds no samples; the first dimensions of its tensors are {counts or 'none'}."
        )
    keep = torch.tensor(spread(range(next(iter(counts.values()))), samples), dtype=torch.long)
    return {name: tensor[keep] for name, tensor in inputs.items()}


def _image_batches(images: tuple[Path, ...], model_path: Path, batch_size: int) -> Iterator[dict[str, Tensor]]:
    from transformers import AutoImageProcessor

    try:
        from PIL import Image

        processor = AutoImageProcessor.from_pretrained(model_path, local_files_only=True)
    except (ImportError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{model_path}: images cannot be prepared ({str(error).splitlines()[0]}). It needs pillow and the checkpoint's preprocessor_config.json;"
            " or give calibration as .safetensors with `pixel_values`."
        ) from error
    for start in range(0, len(images), batch_size):
        pictures = []
        for path in images[start : start + batch_size]:
            regular_file(path)
            try:
                with Image.open(path) as picture:
                    pictures.append(picture.convert("RGB"))
            except Exception as error:  # of a damaged picture Pillow may raise anything
                raise ConfigError(
                    f"{path}: is no picture that can be read ({error}). Remove it, or save it again."
                ) from error
        yield dict(processor(pictures, return_tensors="pt"))


def spread(items: Any, samples: int | None) -> list[Any]:
    """`samples` of the items at even distances (files are often sorted by class), or all."""
    count = len(items)
    if samples is None or samples >= count:
        return list(items)
    return [items[i * count // samples] for i in range(samples)]


def _digest(path: Path) -> str:
    if path.is_dir():
        return hashlib.sha256(
            "\n".join(sorted(p.name for p in path.rglob("*"))).encode("utf-8", "surrogateescape")
        ).hexdigest()[:12]
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()[:12]

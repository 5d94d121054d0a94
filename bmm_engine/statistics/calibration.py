"""Calibration data from files: texts, tables, ready-made model inputs or images, as batches for `collect_grams`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bmm_engine.checkpoint.safetensors_io import SafetensorsFile
from bmm_engine.checkpoint.tokenizer import has_tokenizer
from bmm_engine.errors import CheckpointError, ConfigError, EmptyCalibrationError, cut, listed, shown
from bmm_engine.statistics.patches import GRIDS, patch_counts, select_samples
from bmm_engine.statistics.rows import read_lines, read_rows, text_of
from bmm_engine.statistics.text_file import check_path, check_regular

_COPY_TOKENIZER = "Copy the base's tokenizer files there, or give calibration as .safetensors of model inputs."
# What the tokens of targets are called before a model has its own name for them.
TARGET = "target_"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class CalibrationData:
    """Samples of one task, read but not yet batched: `texts`, named `inputs` (each (samples, ...)), or `images` (paths). `targets`: beside texts,
    what a decoder is to make of them. `prepared_by`: the folder of the tokenizer or image processor, where it is not the model's own."""

    source: Path
    texts: tuple[str, ...] = ()
    inputs: dict[str, Tensor] | None = None
    images: tuple[Path, ...] = ()
    targets: tuple[str, ...] = ()
    prepared_by: Path | None = None

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

        Texts of like length go together, so that little is padding, unless they are `ordered` already. Tokens of targets are called
        `TARGET + name`. Raises `CheckpointError` without a tokenizer or processor.
        """
        if self.inputs is not None:
            for start in range(0, len(self), batch_size):
                yield select_samples(self.inputs, range(start, min(start + batch_size, len(self))))
        elif self.texts:
            tokenizer = load_tokenizer(self.prepared_by or model_path)
            tokens = tokenizer(list(self.texts), truncation=True, max_length=max_length)
            targets: dict[str, Any] = {}
            if self.targets:
                targets = dict(tokenizer(text_target=list(self.targets), truncation=True, max_length=max_length))
            order = list(range(len(self)))
            if not ordered:
                order.sort(key=lambda i: len(tokens["input_ids"][i]))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                padded = [
                    dict(
                        tokenizer.pad(
                            {key: [values[i] for i in rows] for key, values in own.items()},
                            padding=True,
                            return_tensors="pt",
                        )
                    )
                    for own in (tokens, targets)
                    if own
                ]
                yield {**padded[0], **{f"{TARGET}{key}": value for own in padded[1:] for key, value in own.items()}}
        else:
            yield from _image_batches(self.images, self.prepared_by or model_path, batch_size)


def read_calibration(
    path: Path, *, samples: int | None = None, field: str = "text", target_field: str | None = None
) -> CalibrationData:
    """Read up to `samples` samples (spread evenly over the file) from

    `.txt` (a text on each line), `.jsonl`, `.tsv` or `.csv` (the columns `field` and, if given, `target_field`), `.safetensors` (model inputs by
    name, samples first), or a directory of images. Raises `ConfigError` (no such file, no such column, unknown kind, what is no text, with its
    line) and `EmptyCalibrationError`.
    """
    check_path(path, "calibration")
    if str(path).startswith("~") and not path.exists():
        path = Path(os.path.expanduser(path))
    if not path.exists():
        raise ConfigError(
            f"calibration: {path} does not exist. Give a .txt, .jsonl, .tsv, .csv or .safetensors file, or a folder of images."
        )
    if path.is_dir():
        images = image_files(path)
        data = CalibrationData(path, images=tuple(spread(images, samples)))
    elif path.suffix.lower() == ".safetensors":
        data = CalibrationData(path, inputs=read_inputs(path, samples))
    else:
        rows = [row for row in _read_texts(path, field, target_field) if row[0].strip()]
        texts, targets = zip(*spread(rows, samples), strict=True) if rows else ((), ())
        data = CalibrationData(path, texts=texts, targets=targets if target_field is not None else ())
    if len(data) == 0:
        raise EmptyCalibrationError(
            f"calibration: {path} holds no samples. A few hundred of the expert's own task are enough."
        )
    return data


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, in order. Raises `ConfigError` for what is called one and is no regular file."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    for path in found:
        check_regular(path, "the image")
    return found


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer, able to pad. Raises `CheckpointError`, also where transformers would make one that knows no words."""
    from transformers import AutoTokenizer

    if not has_tokenizer(path):
        raise CheckpointError(
            f"{path}: has no tokenizer: none of its files holds a vocabulary (tokenizer.json, vocab.txt, tokenizer.model, ...). {_COPY_TOKENIZER}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: has no tokenizer that transformers can load ({_first_line(error)}). {_COPY_TOKENIZER}"
        ) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise CheckpointError(
            f"{path}: the tokenizer that transformers makes of its files knows no tokens but {listed(tokenizer.all_special_tokens) or 'none'}:"
            f" every text would be the same to it. {_COPY_TOKENIZER}"
        )
    tokenizer.padding_side = "right"  # on the left, absolute positions and the first token would depend on the batch
    if tokenizer.pad_token is None:  # decoder-only models have none; the attention mask tells padding all the same
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _read_texts(path: Path, field: str, target_field: str | None) -> Iterator[tuple[str, str]]:
    """Texts, and what a decoder is to make of each ("" where that is not asked for)."""
    if path.suffix.lower() == ".txt":
        if target_field is not None:
            raise ConfigError(
                f"{path}: has one text on each line and no column {target_field!r}. Give a .jsonl, .csv or .tsv."
            )
        yield from ((text, "") for text in read_lines(path))
        return
    fields = [field] if target_field is None else [field, target_field]
    for row in read_rows(path, fields):
        found = [text_of(row[name], row.where, name) for name in fields]
        yield found[0], found[-1]


def read_inputs(path: Path, samples: int | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, samples first (pictures may be patches, see `patches.py`), or `samples` of them spread evenly. Raises
    `ConfigError`, `CheckpointError`."""
    check_regular(path)
    file = SafetensorsFile.open(path)  # read, not mapped
    if scalars := [name for name, spec in file.specs.items() if not spec.shape]:
        raise ConfigError(
            f"{path}: {listed(scalars)} has no dimensions. The first dimension of a model input is the sample."
        )
    grids = {name: file.read(name) for name in GRIDS.values() if name in file.specs}
    counts = {
        name: spec.shape[0] if (own := patch_counts(name, spec.shape[0], grids)) is None else len(own)
        for name, spec in file.specs.items()
    }
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"{path}: the inputs differ in their number of samples: {shown(counts)}. The first dimension is the sample;"
            " of pictures as patches, give one grid (image_grid_thw) for each sample."
        )
    if not counts or not all(counts.values()):
        raise EmptyCalibrationError(
            f"calibration: {path} holds no samples: the first dimensions of its tensors are {shown(counts)}."
        )
    keep = spread(range(next(iter(counts.values()))), samples)
    return select_samples({name: file.read(name) for name in file.specs}, keep)


def _first_line(error: Exception) -> str:
    return cut((str(error).splitlines() or [type(error).__name__])[0])


def _image_batches(images: tuple[Path, ...], model_path: Path, batch_size: int) -> Iterator[dict[str, Tensor]]:
    from transformers import AutoImageProcessor

    try:
        from PIL import Image

        processor = AutoImageProcessor.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{model_path}: images cannot be prepared ({_first_line(error)}). It needs pillow and the checkpoint's preprocessor_config.json;"
            " or give calibration as .safetensors with `pixel_values`."
        ) from error
    for start in range(0, len(images), batch_size):
        pictures = []
        for path in images[start : start + batch_size]:
            try:
                with Image.open(path) as picture:
                    pictures.append(picture.convert("RGB"))
            # Image libraries raise whatever a damaged file leads them to.
            except Exception as error:
                raise ConfigError(
                    f"{path}: the image cannot be read ({cut(str(error))}). Write it again, or take it out of the folder."
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

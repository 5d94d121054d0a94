"""What was measured on a model, on disk: tensors in one safetensors file, with all else about them as a JSON record in its metadata."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from bmm_engine.checkpoint.guard import parse_json
from bmm_engine.checkpoint.safetensors_io import TAGS, SafetensorsFile
from bmm_engine.checkpoint.source import TensorSpec
from bmm_engine.checkpoint.validated import validated
from bmm_engine.disk.files import is_file, is_running, siblings
from bmm_engine.errors import CheckpointError, OutputExistsError, OutputWriteError, shown


def write_record(
    path: Path, tensors: Mapping[str, Tensor], format_name: str, record: Mapping[str, Any], what: str
) -> Path:
    """Write tensors and, as JSON metadata under `format_name`, their record, under a temporary name that is then renamed.

    Raises `OutputWriteError`, and `OutputExistsError` as `check_replaceable`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_replaceable(path, format_name, what)
    staged = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in siblings(path, rf"\.{re.escape(path.name)}\.\d+-\w+\.partial"):  # of writers that were killed
            if is_file(left) and not is_running(int(left.name.removeprefix(f".{path.name}.").split("-")[0])):
                left.unlink(missing_ok=True)
        prefix = f".{path.name}.{os.getpid()}-"
        handle, staged = tempfile.mkstemp(prefix=prefix, suffix=".partial", dir=path.parent)
        os.close(handle)
        save_file(dict(tensors), staged, metadata={format_name: json.dumps(record)})
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        raise OutputWriteError(
            f"{path}: the {what} could not be written ({error}). Free some space or choose another path."
        ) from error
    finally:
        if staged is not None and os.path.exists(staged):
            os.unlink(staged)
    return path


class Record(BaseModel):
    """What every file says beside its tensors. No key is unknown, and none of another type."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: str = ""
    version: int
    fingerprints: dict[str, str]
    weights_dtype: Literal["float32", "float64", "float16", "bfloat16"]
    calibration: str
    aliases: dict[str, str]


R = TypeVar("R", bound=Record)


def check_replaceable(path: Path, format_name: str, what: str) -> None:
    """Refuse a place that is taken by anything but a file of the same format. Raises `OutputExistsError`."""
    if not os.path.lexists(path):
        return
    try:
        if is_file(path) and format_name in SafetensorsFile.open(path).metadata:
            return
    except (CheckpointError, OSError):
        pass
    raise OutputExistsError(
        f"{path}: exists and is no {what} file, so it is not replaced. Choose another path, or move it elsewhere."
    )


def read_record(
    path: Path, format_name: str, version: int, what: str, maker: str, schema: type[R]
) -> tuple[R, SafetensorsFile]:
    """The record of a file by `write_record`, as `schema`, and the file, whose tensors are left on disk.

    `what` it holds, and the `maker` that makes it again, are for messages. Raises `CheckpointError`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such {what} file. Make it with {maker}.")
    try:
        file = SafetensorsFile.open(path)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"{path}: not a readable {what} file ({error}). Collect it again with {maker}."
        ) from error
    if format_name not in file.metadata:
        raise CheckpointError(
            f"{path}: a safetensors file, but not a {what} file (no {format_name!r} metadata). Make one with {maker}."
        )
    remedy = f"Collect it again with {maker}."
    raw = parse_json(file.metadata[format_name], f"{path}: its record", f"collect it again with {maker}")
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{path}: its record is a JSON {type(raw).__name__} where an object is expected. {remedy}"
        )
    if raw.get("version") != version:
        raise CheckpointError(
            f"{path}: {what} format version {shown(raw.get('version'))}, this engine reads {version}. Collect it again."
        )
    return validated(schema, raw, path, remedy), file


def check_tensors(path: Path, stored: Mapping[str, TensorSpec], expected: Iterable[str], maker: str) -> None:
    """Raise `CheckpointError` unless the file holds just the tensors that its record tells of, in float32 or float64."""
    wanted = set(expected)
    for name in sorted(wanted ^ set(stored)):
        said = "tells of it, but it is not there" if name in wanted else "tells nothing of it"
        raise CheckpointError(f"{path}: tensor {shown(name)}: the file's record {said}. Collect it again with {maker}.")
    for name, tensor in stored.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is {TAGS[tensor.dtype]}; what is measured is F32 or F64. Collect it again with {maker}."
            )


def check_names(path: Path, key: str, names: Iterable[str], known: Iterable[str], maker: str) -> None:
    """Raise `CheckpointError` for a name under `key` of the record that is none of the `known` ones."""
    strange = sorted(set(names) - set(known))
    if strange:
        raise CheckpointError(
            f"{path}: {key} names {shown(strange[0])}, of which the file holds nothing. Collect it again with {maker}."
        )

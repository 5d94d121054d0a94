"""What was measured on a model, on disk: tensors in one safetensors file, with all else about them as a JSON record in its metadata."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bmm_engine.disk.files import is_file, is_running, siblings
from bmm_engine.errors import CheckpointError, OutputExistsError, OutputWriteError


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


def check_replaceable(path: Path, format_name: str, what: str) -> None:
    """Refuse a place that is taken by anything but a file of the same format. Raises `OutputExistsError`."""
    from safetensors import SafetensorError, safe_open

    if not os.path.lexists(path):
        return
    try:
        if is_file(path):
            with safe_open(str(path), framework="pt") as file:
                if format_name in (file.metadata() or {}):
                    return
    except (SafetensorError, OSError):
        pass
    raise OutputExistsError(
        f"{path}: exists and is no {what} file, so it is not replaced. Choose another path, or move it elsewhere."
    )


def read_record(
    path: Path, format_name: str, version: int, what: str, maker: str
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The record of a file by `write_record`, and the shapes of its tensors by name; the tensors are left on disk.

    `what` it holds, and the `maker` that makes it again, are for messages. Raises `CheckpointError`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: no such {what} file. Make it with {maker}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable {what} file ({error}). Collect it again with {maker}."
        ) from error
    if format_name not in metadata:
        raise CheckpointError(
            f"{path}: a safetensors file, but not a {what} file (no {format_name!r} metadata). Make one with {maker}."
        )
    record = json.loads(metadata[format_name])
    if record.get("version") != version:
        raise CheckpointError(
            f"{path}: {what} format version {record.get('version')}, this engine reads {version}. Collect it again."
        )
    return record, shapes

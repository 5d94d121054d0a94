"""The guard that every reader of a file stands behind: what is opened is a regular file of a size that is meant, and JSON is what it says once."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from bmm_engine.disk.reading import irregular, unique_keys
from bmm_engine.errors import CheckpointError, cut, shown

MAX_JSON_BYTES = 2**29
DEEPEST_JSON = 100


def regular_file(path: Path) -> os.stat_result:
    """Size and times of a regular file, links followed. Nothing is opened: a pipe would wait for ever, a device need not end.

    Raises CheckpointError for anything else, and for what is not there, leads in a circle, or has a name that the system does not take.
    """
    try:
        info = path.stat()
    except (OSError, ValueError) as error:  # ValueError: NUL, or a name that is no UTF-8
        raise unreadable(path, error) from error
    if kind := irregular(info):
        raise CheckpointError(f"{path}: is not a regular file but {kind}; put the file itself there")
    return info


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a path that the system refuses."""
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"{cut(str(path), 300)}: cannot be read ({reason}); check the path and its permissions")


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """All of a small file. Raises CheckpointError for what is no regular file, and for one of more than `limit` bytes."""
    size = regular_file(path).st_size
    if size > limit:
        raise CheckpointError(
            f"{path}: has {size} bytes, more than the {limit} that such a file may have; download it again"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError when it cannot be read or is something else; see `parse_json`."""
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: holds a JSON {type(value).__name__} where an object is expected; download it again"
        )
    return value


def parse_json(content: str | bytes, where: str, remedy: str = "download it again") -> Any:
    """The value of a JSON text in UTF-8. Raises CheckpointError that begins with `where` and ends with `remedy`.

    Refused are a key that stands twice in one object (readers differ in which one counts), NaN and infinity, unless in a list, where
    infinity is a range's open end (Mamba 2's `time_step_limit`), lone surrogates, and more than `DEEPEST_JSON` levels.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=unique_keys)
        _check_values(value)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not valid JSON ({cut(str(error))}); {remedy}") from error
    return value


def _check_values(value: Any) -> None:
    """No NaN, no infinity of its own, not too deep. Without recursion: what is checked here might be too deep for it."""
    level: list[tuple[str, bool, Any]] = [("", False, value)]
    for _ in range(DEEPEST_JSON):
        below = []
        for key, listed, item in level:
            if isinstance(item, float) and not math.isfinite(item) and (math.isnan(item) or not listed):
                raise ValueError(f"the value of {shown(key, 100)} is {item}, which is no finite number")
            if isinstance(item, str) and not item.isascii():
                item.encode("utf-8")
            if isinstance(item, dict):
                below += [(name, False, own) for name, own in item.items()]
            elif isinstance(item, list):
                below += [(key, True, own) for own in item]
        if not below:
            return
        level = below
    raise ValueError(f"it is nested more than {DEEPEST_JSON} levels deep")

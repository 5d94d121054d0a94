"""Plain values of a file (JSON) as a strict type: one sentence for what does not fit, with the file, the key, its value and the remedy."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bmm_engine.errors import CheckpointError

M = TypeVar("M", bound=BaseModel)

# Faults that one message tells, and characters of a value in it.
_TOLD = 3
_SHOWN = 80


def validated(schema: type[M], raw: Mapping[str, Any], where: Path | str, remedy: str) -> M:
    """The values as `schema`. Raises `CheckpointError`."""
    try:
        return schema.model_validate(dict(raw))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
    told = "; ".join(_told(fault) for fault in faults[:_TOLD])
    more = f" (and {len(faults) - _TOLD} more)" if len(faults) > _TOLD else ""
    raise CheckpointError(f"{where}: {told}{more}. {remedy}") from None


def json_object(text: str, where: Path | str, remedy: str) -> dict[str, Any]:
    """The object that `text` is, no key of it given twice. Raises `CheckpointError`."""
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not valid JSON ({shown(str(error))}). {remedy}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: is a JSON {type(found).__name__} where an object is expected. {remedy}")
    return found


def shown(value: object) -> str:
    """A value as messages show it: not longer than they can bear."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)!r} is there twice")
        found[key] = value
    return found


def _told(fault: Mapping[str, Any]) -> str:
    key = shown(".".join(str(part) for part in fault["loc"] if part != "[key]"))
    if fault["type"] == "extra_forbidden":
        return f"the key {key!r} is unknown"
    if fault["type"] == "missing":
        return f"the key {key!r} is missing"
    text = fault["msg"].removeprefix("Value error, ").rstrip(".")
    text = f"it {text.removeprefix('Input ')}" if text.startswith("Input ") else text
    value = shown(repr(fault["input"]) if isinstance(fault["input"], str) else fault["input"])
    return f"{key} = {value}: {text[: 3 * _SHOWN]}"

"""Plain values of a file (JSON) as a strict type: one sentence for what does not fit, with the file, the key, its value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bmm_engine.errors import CheckpointError, cut, shown

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


def _told(fault: Mapping[str, Any]) -> str:
    key = cut(".".join(str(part) for part in fault["loc"] if part != "[key]"), _SHOWN)
    if fault["type"] == "extra_forbidden":
        return f"the key {key!r} is unknown"
    if fault["type"] == "missing":
        return f"the key {key!r} is missing"
    text = fault["msg"].removeprefix("Value error, ").rstrip(".")
    text = f"it {text.removeprefix('Input ')}" if text.startswith("Input ") else text
    value = shown(fault["input"], _SHOWN)
    return f"{key} = {value}: {text[: 3 * _SHOWN]}"

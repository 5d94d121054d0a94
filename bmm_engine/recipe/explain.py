"""What is wrong with plain values, in words: which key, its value, and the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bmm_engine.errors import ConfigError, cut, listed, shown

S = TypeVar("S", bound=BaseModel)
# The type whose key the last part of a location is.
Owner = Callable[[Sequence[str]], type[BaseModel]]
MOST_FAULTS = 4


def parse_section(section: type[S], raw: Mapping[str, Any], name: str) -> S:
    """Plain values as the section `name` of a recipe. Raises `ConfigError` as a recipe does."""
    try:
        return section.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError(explain(error, lambda loc: section, under=(name,))) from error


def explain(error: ValidationError, owner: Owner, under: Sequence[str] = ()) -> str:
    """What a validation found, in one line: its first faults, and how many more there are. `under`: keys above those of the value validated."""
    found = error.errors(include_url=False, include_context=False)
    more = f"; and {len(found) - MOST_FAULTS} more such faults." if len(found) > MOST_FAULTS else ""
    return "; ".join(_explain_one({**e, "loc": (*under, *e["loc"])}, owner) for e in found[:MOST_FAULTS]) + more


def unknown_key(key: str, known: Iterable[str], where: str = "") -> str:
    """The sentence for a key that nobody knows."""
    known = list(known)
    close = difflib.get_close_matches(cut(key), known, 1, 0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys are {listed(known, 800)}."
    return f"unknown key {shown(where or key)}; {hint}"


def _explain_one(error: Mapping[str, Any], owner: Owner) -> str:
    loc = [str(part) for part in error["loc"]]
    steps = [part for part in loc if not part.startswith("<")]
    where = cut(".".join(steps)) or "recipe"
    if error["type"] == "extra_forbidden":
        return unknown_key(steps[-1], owner(loc).model_fields, ".".join(steps))
    if error["type"] == "missing":
        return f"the key {where!r} is missing; add it."
    text = cut(error["msg"].removeprefix("Value error, ").rstrip("."), 700)
    return f"{where} = {shown(error['input'])}: {text}." if error["loc"] else f"{text}."

"""Plain values as JSON with one spelling for equal values: to store them, to compare them, and to digest them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from bmm_engine.errors import ConfigError

# Up to here every integer is a float64, so that 1 and 1.0 are one number.
_EXACT = 2**53
_SHOWN = 120
ABSENT = "absent"


def plain(value: Any, where: str, *, finite: bool = False) -> Any:
    """The JSON values (dict, list, str, int, float, bool, None) of mappings, sequences and numbers, NumPy's among them.

    Infinity and NaN, which JSON lacks, become the texts "inf", "-inf" and "nan", or with `finite` a `ConfigError`, as do keys that are no
    text and objects of other types. `where` names the value in the message.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if math.isfinite(number):
            return number
        if finite:
            raise ConfigError(
                f"{where}: {number} is no JSON number. Give infinity as the text 'inf'; NaN has no meaning here."
            )
        return str(number)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{where}: key {key!r} is {type(key).__name__}, but keys must be text.")
        return {key: plain(item, f"{where}.{key}", finite=finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]", finite=finite) for i, item in enumerate(value)]
    raise ConfigError(f"{where}: {type(value).__name__} is no JSON value. Give numbers, texts, lists and dictionaries.")


def dumps(value: Any, *, ordered: bool = False) -> str:
    """JSON of plain values without spaces; `ordered`: with keys sorted, so that the order in which they were set does not show."""
    return json.dumps(value, sort_keys=ordered, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 in hexadecimal; equal for plain values that are equal as JSON: in any order of keys, and 1 as 1.0."""
    return hashlib.sha256(dumps(_one_number(value), ordered=True).encode()).hexdigest()


def first_difference(a: Any, b: Any, path: str = "") -> tuple[str, str, str] | None:
    """The first key, in sorted order, at which two plain values differ, as "recipe.scale" or "experts[1].name", and both values as JSON (cut)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            at = f"{path}.{key}" if path else key
            if key not in a or key not in b:
                return at, _shown(a[key]) if key in a else ABSENT, _shown(b[key]) if key in b else ABSENT
            if found := first_difference(a[key], b[key], at):
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if found := first_difference(x, y, f"{path}[{i}]"):
                return found
        return None
    return None if _same(a, b) else (path, _shown(a), _shown(b))


def _one_number(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _one_number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_one_number(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    return value


def _same(a: Any, b: Any) -> bool:
    return dumps(_one_number(a), ordered=True) == dumps(_one_number(b), ordered=True)


def _shown(value: Any) -> str:
    text = dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

"""Values of a rule's parameters: one for all tensors, one per expert, a gradient over depth, or the first filter that matches.

    0.3                                        everywhere
    [0.3, 0.5]                                 of a per-expert parameter: one for each expert, each of them any of these forms
    [0.0, 1.0], or {gradient: [0.0, 1.0]}      interpolated from the first layer to the last; the bare list where a parameter is not per expert
    [{filter: mlp, value: 0.5}, {value: 0.2}]  the first whose filter is part of the tensor's name (or matches it, with * ? [ in it)

Where no filter matches, the parameter keeps its default. Tensors outside the layers (embeddings, final norm, head) count as depth 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, TypeVar

from bmm_engine.errors import ConfigError, shown

T = TypeVar("T")
Check = Callable[[Any], Any]


class _PerExpert:
    """Marks a parameter that has a value for each expert."""


PER_EXPERT = _PerExpert()
# In a rule's signature: `weight: PerExpert[float] = each(1.0)`; the rule gets a tuple with one value for each expert.
PerExpert = Annotated[Sequence[T], PER_EXPERT]


@dataclass(frozen=True)
class Each:
    """The default of a per-expert parameter: the same value for every expert."""

    value: Any


def each(value: Any) -> Any:
    """The default of a per-expert parameter."""
    return Each(value)


class DepthMap:
    """Tensor name -> depth in [0, 1]: `layer / (layers - 1)` by the first number among the parts of its name; 0 outside the layers."""

    _LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")

    def __init__(self, names: Iterable[str]):
        self._layers: dict[str, int] = {}
        for name in names:
            if found := self._LAYER.search(name):
                stack = name[: found.start(1)]
                self._layers[stack] = max(self._layers.get(stack, 0), int(found[1]) + 1)

    def layer(self, name: str) -> tuple[str, int, int] | None:
        """Which layer a tensor is in: the stack's name, the layer's number in it, and how many there are; None outside the layers."""
        found = self._LAYER.search(name)
        if found is None:
            return None
        stack = name[: found.start(1)]
        return stack, int(found[1]), self._layers.get(stack, 1)

    def __call__(self, name: str) -> float:
        if (layer := self.layer(name)) is None:
            return 0.0
        _, index, layers = layer
        return index / (layers - 1) if layers > 1 else 1.0


@dataclass(frozen=True)
class _Constant:
    value: Any

    def at(self, name: str, depth: float) -> Any:
        return self.value

    def all(self) -> list[Any]:
        return [self.value]


@dataclass(frozen=True)
class _Gradient:
    values: tuple[Any, ...]

    def at(self, name: str, depth: float) -> Any:
        position = depth * (len(self.values) - 1)
        low = int(position)
        share = position - low
        if not share or not isinstance(self.values[low], float):  # counts, switches and words do not interpolate
            return self.values[low]
        return (1 - share) * self.values[low] + share * self.values[low + 1]

    def all(self) -> list[Any]:
        return list(self.values)


@dataclass(frozen=True)
class _Filters:
    cases: tuple[tuple[str | None, Any], ...]
    default: Any

    def at(self, name: str, depth: float) -> Any:
        for pattern, value in self.cases:
            if pattern is None or pattern in name or (set(pattern) & set("*?[") and fnmatchcase(name, pattern)):
                return value.at(name, depth)
        return self.default.at(name, depth)

    def all(self) -> list[Any]:
        """The default too, unless a case takes every name."""
        found = [value for _, case in self.cases for value in case.all()]
        return found if any(pattern is None for pattern, _ in self.cases) else [*found, *self.default.all()]


@dataclass(frozen=True)
class _Experts:
    items: tuple[Any, ...]

    def at(self, name: str, depth: float) -> Any:
        return tuple(item.at(name, depth) for item in self.items)

    def all(self) -> list[Any]:
        return [value for item in self.items for value in item.all()]


class Setting:
    """A parameter's value as written, checked; `at` gives what holds for one tensor."""

    def __init__(self, raw: Any, *, where: str, check: Check, default: Any, per_expert: bool = False):
        """`check` turns a scalar into the parameter's type or raises ValueError. Raises `ConfigError` naming `where` and the value."""
        self.raw, self.per_expert = raw, per_expert
        self._where, self._check = where, check
        self._default = _Constant(default)
        self._root = self._parse(raw, per_expert)

    def at(self, name: str, depth: float, experts: int) -> Any:
        """The value for a tensor; of a per-expert parameter a tuple. Raises `ConfigError` if it has values for another number of experts."""
        value = self._root.at(name, depth)
        if not self.per_expert:
            return value
        if not isinstance(value, tuple):
            return (value,) * experts
        if len(value) != experts:
            raise ConfigError(
                f"{self._where}: {len(value)} values for {experts} experts; give one for each, or one for all. (A gradient over depth is"
                " written {gradient: [...]} here.)"
            )
        return value

    def values(self) -> list[Any]:
        """Every value that is written for some tensor or expert, or the default that holds where none is."""
        found: list[Any] = self._root.all()
        return found

    def _parse(self, raw: Any, per_expert: bool) -> Any:
        if isinstance(raw, Each):
            return _Constant(raw.value)
        if isinstance(raw, Mapping):
            return self._mapping(raw)
        if isinstance(raw, (list, tuple)):
            if not raw:
                raise ConfigError(f"{self._where}: an empty list says nothing; give a value.")
            if all(isinstance(item, Mapping) and "value" in item for item in raw):
                return self._filters(raw, per_expert)
            if per_expert:
                return _Experts(tuple(self._parse(item, False) for item in raw))
            return self._gradient(raw)
        return _Constant(self._scalar(raw))

    def _mapping(self, raw: Mapping[str, Any]) -> Any:
        if isinstance(self._default.value, Mapping):  # then one is a value
            return _Constant(self._scalar(raw))
        if set(raw) == {"gradient"} and isinstance(raw["gradient"], (list, tuple)) and raw["gradient"]:
            return self._gradient(raw["gradient"])
        raise ConfigError(
            f"{self._where}: {shown(dict(raw))} is no value; write a value, {{gradient: [first, ..., last]}}, or a list of {{filter, value}}."
        )

    def _filters(self, raw: Sequence[Mapping[str, Any]], per_expert: bool) -> _Filters:
        cases = []
        for case in raw:
            unknown = set(case) - {"filter", "value"}
            pattern = case.get("filter")
            if unknown or not (pattern is None or isinstance(pattern, str)):
                raise ConfigError(
                    f"{self._where}: {shown(dict(case))} must have `value` and, as text, `filter`, nothing else."
                )
            cases.append((None if pattern == "*" else pattern, self._parse(case["value"], per_expert)))
        return _Filters(tuple(cases), self._default)

    def _gradient(self, raw: Sequence[Any]) -> _Gradient:
        return _Gradient(tuple(self._scalar(item) for item in raw))

    def _scalar(self, raw: Any) -> Any:
        try:
            return self._check(raw)
        except ValueError as error:
            reason = str(error)
        raise ConfigError(f"{self._where} = {shown(raw)}: {reason.rstrip('.')}{'' if reason.endswith('?') else '.'}")

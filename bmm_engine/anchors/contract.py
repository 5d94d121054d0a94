"""What a merging rule is: a pure function of (base, experts), with its scope, its paper and its parameters.

Scopes:
* `tensor`: `rule(base, experts, **parameters) -> merged` on any float tensor by itself; `elementwise` ones may get a slab of rows at a time.
* `module`: the same, on the (out, in) weight of a linear module; every other tensor gets the mean of the experts.
* `model`: `reduce(stream, **parameters) -> state` sees the whole model first (thresholds, norms), then `rule(base, experts, state=..., ...)`
  is elementwise. `stream()` starts a new pass and yields `(name, base, experts)`, in slabs.

Tensors come in float32 (float64 if the model is) on one device; a rule must not write into them.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from bmm_engine.errors import ConfigError

Scope = Literal["tensor", "module", "model"]
Stream = Callable[[], Iterable[tuple[str, Tensor, Sequence[Tensor]]]]

_registry: dict[str, Anchor] = {}


@dataclass(frozen=True)
class Anchor:
    """A registered rule. Its keyword-only arguments, with their annotations and defaults, are its schema."""

    name: str
    rule: Callable[..., Tensor]
    scope: Scope
    paper: str
    elementwise: bool = False
    reduce: Callable[..., Any] | None = None

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.rule) or "").split("\n")[0]

    @cached_property
    def _schema(self) -> Any:
        from pydantic import ConfigDict, create_model

        fields = {
            p.name: (p.annotation, p.default)
            for p in inspect.signature(self.rule, eval_str=True).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name != "state"
        }
        return create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)  # type: ignore[call-overload]

    def parameters(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The rule's parameters, `given` ones checked, the others at their defaults. Raises `ConfigError`."""
        from pydantic import ValidationError

        given = dict(given or {})
        known = list(self._schema.model_fields)
        for key in given:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"it takes: {', '.join(known) or 'none'}."
                raise ConfigError(f"anchor {self.name!r} has no parameter {key!r}; {hint}")
        try:
            return dict(self._schema(**given).model_dump())
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                f"anchor {self.name!r}: {'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}."
            ) from error


def anchor(
    *, scope: Scope, paper: str, elementwise: bool = False, reduce: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function as the rule of its name."""

    def register(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if (scope == "model") != (reduce is not None):
            raise ConfigError(f"anchor {rule.__name__!r}: a rule has a `reduce` exactly if its scope is 'model'.")
        _registry[rule.__name__] = Anchor(rule.__name__, rule, scope, paper, elementwise or scope == "model", reduce)
        return rule

    return register


def registered_anchors() -> dict[str, Anchor]:
    """All rules by name, sorted."""
    return dict(sorted(_registry.items()))


def get_anchor(name: str) -> Anchor:
    """The rule called `name`. Raises `ConfigError` with the nearest name."""
    if name not in _registry:
        close = difflib.get_close_matches(name, _registry, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(sorted(_registry))}."
        raise ConfigError(f"there is no anchor {name!r}; {hint}")
    return _registry[name]

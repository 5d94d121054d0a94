"""What was measured on the experts, as a rule takes it: one for each, of the module's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from bmm_engine.anchors.contract import Site
from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.solving.moments import DenseMoment, Moment

_WORDS = {
    "grams": ("Grams", "Gram", "bmm collect"),
    "fishers": ("Fisher tensors", "Fisher information", "bmm collect --fisher"),
    "sensitivities": ("sensitivities", "sensitivity", "bmm collect --sensitivity"),
}


def measured_at(site: Site, what: Literal["grams", "fishers", "sensitivities"]) -> Sequence[Any]:
    """What `site` has of the kind: for each expert a matrix, or a moment. Raises `ConfigError`, `ShapeMismatchError`."""
    found: Sequence[Any] = getattr(site, what)
    several, one, command = _WORDS[what]
    if len(found) != len(site.experts):
        raise ConfigError(
            f"{site.name}: {len(found)} {several} for {len(site.experts)} experts; this rule needs one for each, measured by `{command}`."
        )
    rows, columns = site.base.shape
    wanted = {"grams": (columns, columns), "fishers": (rows, columns), "sensitivities": (rows, rows)}[what]
    for t, own in enumerate(found):
        shape = tuple(own.shape) if isinstance(own, Tensor) else (own.width, own.width)
        if shape != wanted:
            raise ShapeMismatchError(
                f"{site.name}, expert {t}: its {one} is {shape}, the module needs {wanted}; was it measured on another model?"
            )
    return found


def times(rows: Tensor, measured: Tensor | Moment, name: str) -> Tensor:
    """`rows @ measured` (n, width) in the dtype of `rows`, a matrix or moment (width, width). Raises `NonFiniteGramError`."""
    moment = DenseMoment(measured, module=name) if isinstance(measured, Tensor) else measured
    return moment.apply(rows)

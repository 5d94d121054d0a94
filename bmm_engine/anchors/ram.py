"""RAM and RAM+: changes that one agent alone has are kept, shared ones averaged (arXiv 2601.13572)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bmm_engine.anchors.contract import Model, anchor
from bmm_engine.anchors.domains import NonNegative
from bmm_engine.anchors.select import difference, just_above
from bmm_engine.ops.blend import blend

_PAPER = "Yuan et al. 2026, arXiv 2601.13572"


@anchor(scope="tensor", elementwise=True, stored=True, paper=_PAPER)
def ram(base: Tensor, experts: Sequence[Tensor], *, epsilon: NonNegative = 1e-5, scaling: float = 1.0) -> Tensor:
    """`W = W_0 + scaling m`, m the mean of those tau_t with `|tau_t| > epsilon`: a change that one expert alone has is not thinned out."""
    return blend(base, experts, combine="mean_kept", lower=[just_above(epsilon)] * len(experts), scaling=scaling)


def count(model: Model) -> Sequence[tuple[int, int]] | None:
    """Per expert, how many of its changes over the model it shares, and how many it has alone."""
    if model.constant("extent") == "tensor":
        return None
    epsilon = model.constant("epsilon")
    counts: list[tuple[int, int]] = []
    for found in model.map(lambda site: _shared_and_unique(site.base, site.experts, epsilon)):
        counts = [(a + c, b + d) for (a, b), (c, d) in zip(counts, found, strict=True)] if counts else found
    return counts


@anchor(
    scope="model",
    elementwise=lambda parameters: parameters["extent"] == "model",
    stored=True,
    reduce=count,
    paper=_PAPER,
)
def ram_plus(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    state: Sequence[tuple[int, int]] | None,
    r: NonNegative = 0.1,
    alpha: NonNegative = 0.2,
    epsilon: NonNegative = 1e-5,
    scaling: float = 1.0,
    extent: Literal["model", "tensor"] = "model",
) -> Tensor:
    """RAM whose unshared changes are multiplied by `1 + r min(rho_t, alpha)`, rho_t = shared / unshared changes of expert t.

    What an expert shares loses strength in the mean; what it has alone makes up for that. `extent`: rho_t is of the whole model, or of each
    tensor (mergekit's ramplus_tl). `epsilon`: a change is larger than this.
    """
    counts = _shared_and_unique(base, experts, epsilon) if state is None else state
    unique = [1 + r * (min(shared / alone, alpha) if alone else alpha * (shared > 0)) for shared, alone in counts]
    return blend(
        base,
        experts,
        combine="mean_kept",
        lower=[just_above(epsilon)] * len(experts),
        unique=unique,
        scaling=scaling,
    )


def _shared_and_unique(base: Tensor, experts: Sequence[Tensor], epsilon: float) -> list[tuple[int, int]]:
    least = just_above(epsilon)
    changed = [difference(expert, base).abs().float() >= least for expert in experts]
    several = torch.zeros(base.shape, dtype=torch.int32, device=base.device)
    for mask in changed:
        several += mask
    return [(int((mask & (several > 1)).sum()), int((mask & (several == 1)).sum())) for mask in changed]

"""TIES: trim, elect a sign, merge what agrees (arXiv 2306.01708), over the whole model's flat task vectors as its authors do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from bmm_engine.anchors.contract import Model, Site, anchor
from bmm_engine.anchors.domains import Elect, Share
from bmm_engine.anchors.select import exact_bounds, kth_smallest_magnitudes, over
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.anchors.sparse import Masks, balance_masked, blend_masked, restore_l1, without_l1


@dataclass(frozen=True)
class TiesState:
    """What was decided over the whole model: per task the magnitude below which it is trimmed, and the sign where none is elected."""

    thresholds: tuple[float, ...] | None
    tie: float


def decide(model: Model) -> TiesState:
    """Two passes for the thresholds, if they are the model's, and one for the majority sign, if that is asked for."""
    thresholds = None
    if model.constant("threshold") == "model":
        thresholds = kth_smallest_magnitudes(
            over(model, lambda site: [[(expert, site.base) for expert in site.experts]]),
            [partial(_first_kept, share) for share in model.constant("density")],
        )
    if model.constant("tie") == "positive":
        return TiesState(thresholds, 1.0)

    def balance_at(site: Site) -> int:
        # A task alone agrees with itself.
        return balance_masked(site, _trim(site, thresholds), site.parameters["weight"]) if len(site.experts) > 1 else 0

    balance = sum(model.map(balance_at))
    return TiesState(thresholds, 1.0 if balance > 0 else -1.0)


@anchor(
    scope="model",
    elementwise=lambda parameters: parameters["threshold"] == "model" and without_l1(parameters),
    stored=True,
    reduce=decide,
    paper="Yadav et al. 2023, arXiv 2306.01708",
)
def ties(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    state: TiesState,
    density: PerExpert[Share] = each(0.2),
    weight: PerExpert[float] = each(1.0),
    scaling: float = 1.0,
    threshold: Literal["model", "tensor"] = "model",
    elect: Elect = "sum",
    tie: Literal["majority", "positive"] = "majority",
    normalize: bool = True,
    rescale: Literal["none", "l1"] = "none",
) -> Tensor:
    """Keep each task's top `density` share by magnitude, elect a sign per entry, average the entries that agree: `W = W_0 + scaling m`.

    `threshold`: the share is of the whole model's entries, those equal to the last one kept too (the authors), or of each tensor's, exactly
    max(1, int(density n)) of them, the earlier of equals. `elect`: the sign of the sum, or of the number of signs. `tie`: where that is 0, the
    sign that most sums over the model have (the authors), or plus. `weight`: a factor of each task vector. `normalize`: divide by the weights
    of those that agree; without it, their sum. `rescale`: "l1" gives what is left of a tensor the L1 norm it had.
    mergekit's form: threshold: tensor, tie: positive.
    """
    return blend_masked(
        site,
        _trim(site, state.thresholds),
        combine=f"elect_{elect}",
        weights=weight,
        normalize=normalize,
        tie=state.tie,
        scaling=scaling,
    )


def _first_kept(share: float, n: int) -> int:
    """The rank of the least magnitude that is kept; the authors count what is cut, and keep that last one too."""
    return n - int(n * share)


def _trim(site: Site, thresholds: Sequence[float] | None) -> Masks:
    masks = Masks.all_of(len(site.experts))
    n = site.base.numel()
    for t, (expert, share) in enumerate(zip(site.experts, site.parameters["density"], strict=True)):
        if thresholds is not None:
            masks.lower[t] = thresholds[t]
        elif 0 < share < 1:
            masks.lower[t], _, masks.dropped[t] = exact_bounds(site.base, expert, n - max(1, int(share * n)), 0)
        masks.scales[t] = 0.0 if share == 0 else 1.0
    if site.parameters["rescale"] == "l1":
        restore_l1(site, masks, [0 < share < 1 for share in site.parameters["density"]])
    return masks

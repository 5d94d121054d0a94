"""DARE: drop entries of the task vectors at random and rescale the others (arXiv 2311.03099), before task arithmetic or TIES."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bmm_engine.anchors.contract import Model, Site, anchor
from bmm_engine.anchors.domains import Elect, PositiveShare, Rescale, Share
from bmm_engine.anchors.select import difference, kth_smallest_magnitudes, over
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.anchors.sparse import Masks, blend_masked, linear_scale, not_finite, restore_l1, without_l1
from bmm_engine.errors import ConfigError
from bmm_engine.ops.blend import blend, sign_balance

_PAPER = "Yu et al. 2024, arXiv 2311.03099"


@dataclass(frozen=True)
class DareTiesState:
    """What was decided over the whole model: per task the magnitude below which it is trimmed, and the sign where none is elected."""

    lower: tuple[float, ...] | None
    tie: float


def decide(model: Model) -> DareTiesState:
    """Two passes for the thresholds, if anything is trimmed, and one for the majority sign, if that is asked for."""
    trim, lower = model.constant("trim"), None
    if trim < 1:
        if model.constant("rescale") == "l1":
            raise ConfigError(
                f"anchor 'dare_ties': trim = {trim} is decided by magnitude over the whole model, where rescale = 'l1' gives each tensor another"
                " factor; set trim: 1, or rescale: inverse or none."
            )
        density = model.constant("density")
        lower = kth_smallest_magnitudes(
            over(model, lambda site: [_dropped(site, _thinned(site))]),
            [lambda n: n - int(n * trim)] * len(density),
        )
    if model.constant("tie") == "positive":
        return DareTiesState(lower, 1.0)

    def balance_at(site: Site) -> int:
        if len(site.experts) == 1:  # it agrees with itself
            return 0
        masks = _thinned(site)
        dropped = _dropped(site, masks)
        wide = max((tau.dtype for tau in dropped), key=lambda dtype: dtype.itemsize)
        zero = torch.zeros_like(dropped[0], dtype=wide)
        return sign_balance(zero, dropped, weights=site.parameters["weight"], scales=masks.scales, lower=lower)

    balance = sum(model.map(balance_at))
    return DareTiesState(lower, 1.0 if balance > 0 else -1.0)


@anchor(scope="tensor", elementwise=without_l1, stored=True, paper=_PAPER)
def dare_linear(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    density: PerExpert[Share] = each(0.5),
    weight: PerExpert[float] = each(1.0),
    scaling: float = 1.0,
    rescale: Rescale = "inverse",
    normalize: bool = False,
    seed: int = 0,
) -> Tensor:
    """Keep each entry of a task vector with probability `density`, divide it by that, and add: `W = W_0 + scaling sum_t w_t tau~_t`.

    `density`: 1 - p of the paper, which shows p from 0.1 to 0.9. `weight`: w_t. `rescale`: 1 / density (the authors), what restores the
    tensor's L1 norm (mergekit), or none. `normalize`: divide by the sum of the weights. `seed`: of the random choice.
    """
    return blend_masked(site, _thinned(site), weights=weight, scaling=linear_scale(weight, scaling, normalize))


@anchor(
    scope="model",
    elementwise=without_l1,
    stored=True,
    reduce=decide,
    paper=_PAPER,
)
def dare_ties(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    state: DareTiesState,
    density: PerExpert[Share] = each(0.5),
    trim: PositiveShare = 0.2,
    weight: PerExpert[float] = each(1.0),
    scaling: float = 1.0,
    rescale: Rescale = "inverse",
    elect: Elect = "sum",
    tie: Literal["majority", "positive"] = "majority",
    normalize: bool = True,
    seed: int = 0,
) -> Tensor:
    """TIES on task vectors thinned by DARE: keep entries with probability `density`, trim, elect a sign, average those that agree.

    `trim`: the share of the whole model's entries that TIES keeps, by magnitude, the dropped ones among them; it changes nothing if `density`
    is less. `density`, `rescale`, `seed`: see dare_linear. `elect`, `tie`, `weight`, `normalize`: see ties.
    mergekit's form: trim: 1, rescale: l1, tie: positive, normalize: false.
    """
    masks = _thinned(site)
    if state.lower is not None:
        masks.lower[:] = state.lower
    return blend_masked(
        site,
        masks,
        combine=f"elect_{elect}",
        weights=weight,
        normalize=normalize,
        tie=state.tie,
        scaling=scaling,
    )


def _thinned(site: Site) -> Masks:
    masks = Masks.all_of(len(site.experts))
    density, rescale = site.parameters["density"], site.parameters["rescale"]
    masks.keep[:] = density
    masks.seeds[:] = [site.seed(site.parameters["seed"], t) for t in range(len(density))]
    if rescale == "inverse":
        masks.scales[:] = [1 / share if share else 0.0 for share in density]
    if rescale == "l1":
        restore_l1(site, masks, [True] * len(density))
    return masks


def _dropped(site: Site, masks: Masks) -> list[Tensor]:
    """The task vectors, with zeros where entries are dropped; in float32, or float64 where the models are."""
    found = []
    for t, expert in enumerate(site.experts):
        tau = difference(expert, site.base)
        if not bool(tau.isfinite().all()):
            raise not_finite(site.base, t)
        chance, seeds = [masks.keep[t]], [masks.seeds[t]]
        found.append(blend(torch.zeros_like(tau), [tau], keep=chance, seeds=seeds, first=site.first))
    return found

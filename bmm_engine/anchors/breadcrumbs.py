"""Model Breadcrumbs: task vectors without their largest and their smallest entries (arXiv 2312.06795)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.domains import Elect, Share
from bmm_engine.anchors.select import exact_bounds
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.anchors.sparse import Masks, blend_masked, linear_scale, restore_l1, row_ranks, without_l1

_PAPER = "Davari and Belilovsky 2024, arXiv 2312.06795"
Extent = Literal["tensor", "row"]
Rescale = Literal["none", "l1"]


def _by_rows(parameters: Mapping[str, Any]) -> bool:
    return parameters["extent"] == "row" and without_l1(parameters)


@anchor(scope="tensor", elementwise=_by_rows, stored=True, paper=_PAPER)
def breadcrumbs(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    density: PerExpert[Share] = each(0.15),
    gamma: PerExpert[Share] = each(0.006),
    weight: PerExpert[float] = each(1.0),
    scaling: float = 0.2,
    extent: Extent = "tensor",
    rescale: Rescale = "none",
    normalize: bool = False,
) -> Tensor:
    """Drop the largest `gamma` share of each tensor's task vector and the smallest, keep `density`, add: `W = W_0 + scaling sum_t w_t tau~_t`.

    Of n entries int(gamma n) of the largest go, then the next int(density n) stay, and where those are not enough, fewer of the largest go. A
    tensor too small for any to stay keeps the base's values. `density`: 1 keeps all. `weight`: w_t. `extent`: entries are ranked within their
    tensor (the paper: layer), or within their row (the authors' code). `rescale`: "l1" gives what is left of a tensor the L1 norm it had.
    `normalize`: divide by the sum of the weights.
    mergekit's form: gamma: 0.01, scaling: 1, and its density is 1 unless given.
    """
    middle, masks = _crumbs(site)
    return blend_masked(middle, masks, weights=weight, scaling=linear_scale(weight, scaling, normalize))


@anchor(scope="tensor", elementwise=_by_rows, stored=True, paper=f"{_PAPER}; Yadav et al. 2023, arXiv 2306.01708")
def breadcrumbs_ties(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    density: PerExpert[Share] = each(0.15),
    gamma: PerExpert[Share] = each(0.006),
    weight: PerExpert[float] = each(1.0),
    scaling: float = 1.0,
    extent: Extent = "tensor",
    rescale: Rescale = "none",
    elect: Elect = "sum",
    normalize: bool = True,
) -> Tensor:
    """Breadcrumbs whose signs are elected as in TIES: entries that disagree with the sign of the sum (plus, if it is 0) do not count.

    `normalize`: divide by the weights of those that agree, as TIES does; mergekit's form is without. `elect`: see ties. The others: see
    breadcrumbs.
    """
    middle, masks = _crumbs(site)
    options = {"weights": weight, "normalize": normalize, "scaling": scaling}
    return blend_masked(middle, masks, combine=f"elect_{elect}", **options)


def _crumbs(site: Site) -> tuple[Site, Masks]:
    """What is left of each expert, by the site's parameters: experts, whose rows may have lost entries already, and masks of them."""
    given = site.parameters
    masks, experts = Masks.all_of(len(site.experts)), list(site.experts)
    n = site.base.numel()
    for t, (expert, density, gamma) in enumerate(zip(site.experts, given["density"], given["gamma"], strict=True)):
        if density < 1 and given["extent"] == "row":
            experts[t] = _middle_of_rows(site.base, expert, t, density, gamma) if site.base.dim() else expert
        elif density < 1:
            smallest, largest = _split(n, density, gamma)
            if smallest + largest == n:
                masks.scales[t] = 0.0
            else:
                masks.lower[t], masks.upper[t], masks.dropped[t] = exact_bounds(site.base, expert, smallest, largest)
    middle = replace(site, experts=experts)
    if given["rescale"] == "l1":
        thinned = [density < 1 and scale > 0 for density, scale in zip(given["density"], masks.scales, strict=True)]
        restore_l1(middle, masks, thinned, whole=site.experts)
    return middle, masks


def _split(n: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of n entries go, of the smallest and of the largest."""
    kept = int(density * n)
    smallest = max(0, n - kept - int(gamma * n))
    return smallest, n - kept - smallest


def _middle_of_rows(base: Tensor, expert: Tensor, t: int, density: float, gamma: float) -> Tensor:
    """The expert with the base's values in what is dropped of each row (of the last dimension)."""
    n = base.shape[-1]
    smallest, largest = _split(n, density, gamma)
    ranks = row_ranks(base, expert, t, n)
    places = (ranks.double() * (n - 1)).round()
    wide = torch.promote_types(base.dtype, expert.dtype)
    return torch.where((places >= smallest) & (places < n - largest), expert.to(wide), base.to(wide))

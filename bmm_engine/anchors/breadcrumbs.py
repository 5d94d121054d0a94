"""Model Breadcrumbs: task vectors without their largest and their smallest entries (arXiv 2312.06795)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.select import keep_exactly
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.anchors.sparse import kept_alone, l1_scale, linear_scale, row_ranks
from bmm_engine.ops.blend import blend

_PAPER = "Davari and Belilovsky 2024, arXiv 2312.06795"
Share = Annotated[float, Field(ge=0, le=1)]
Extent = Literal["tensor", "row"]
Rescale = Literal["none", "l1"]


@dataclass(frozen=True)
class Crumbs:
    """Experts whose task vectors count between the magnitudes `lower` and `upper`, times `scales`."""

    experts: Sequence[Tensor]
    lower: Sequence[float | None]
    upper: Sequence[float | None]
    scales: Sequence[float]


def _by_rows(parameters: Mapping[str, Any]) -> bool:
    return parameters["extent"] == "row" and parameters["rescale"] == "none"


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
    crumbs = _crumbs(site)
    return blend(
        base,
        crumbs.experts,
        weights=weight,
        scales=crumbs.scales,
        lower=crumbs.lower,
        upper=crumbs.upper,
        scaling=linear_scale(weight, scaling, normalize),
    )


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
    elect: Literal["sum", "count"] = "sum",
    normalize: bool = True,
) -> Tensor:
    """Breadcrumbs whose signs are elected as in TIES: entries that disagree with the sign of the sum (plus, if it is 0) do not count.

    `normalize`: divide by the weights of those that agree, as TIES does; mergekit's form is without. `elect`: see ties. The others: see
    breadcrumbs.
    """
    crumbs = _crumbs(site)
    return blend(
        base,
        crumbs.experts,
        combine=f"elect_{elect}",
        weights=weight,
        scales=crumbs.scales,
        lower=crumbs.lower,
        upper=crumbs.upper,
        normalize=normalize,
        scaling=scaling,
    )


def _crumbs(site: Site) -> Crumbs:
    """What is left of each expert, by the site's parameters."""
    given = site.parameters
    experts: list[Tensor] = []
    lower: list[float | None] = []
    upper: list[float | None] = []
    scales: list[float] = []
    for t, (expert, density, gamma) in enumerate(zip(site.experts, given["density"], given["gamma"], strict=True)):
        kept, least, most, scale = expert, None, None, 1.0
        n = site.base.numel()
        if density < 1 and given["extent"] == "row":
            kept = _middle_of_rows(site.base, expert, t, density, gamma) if site.base.dim() else expert
        elif density < 1:
            smallest, largest = _split(n, density, gamma)
            if smallest + largest == n:
                scale = 0.0
            else:
                kept, least, most = keep_exactly(site.base, expert, smallest, largest)
        if density < 1 and given["rescale"] == "l1" and scale:
            scale = l1_scale(site.base, expert, kept_alone(site.base, kept, t, lower=least, upper=most))
        experts.append(kept)
        lower.append(least)
        upper.append(most)
        scales.append(scale)
    return Crumbs(experts, lower, upper, scales)


def _split(n: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of n entries go, of the smallest and of the largest."""
    kept = int(density * n)
    smallest = max(0, n - kept - int(gamma * n))
    return smallest, n - kept - smallest


def _middle_of_rows(base: Tensor, expert: Tensor, t: int, density: float, gamma: float) -> Tensor:
    """The expert with the base's values in what is dropped of each row (of the last dimension)."""
    n = base.shape[-1]
    smallest, largest = _split(n, density, gamma)
    ranks = row_ranks(base, expert, t, (base.numel() // max(n, 1), n))
    places = (ranks.double() * (n - 1)).round()
    wide = torch.promote_types(base.dtype, expert.dtype)
    return torch.where((places >= smallest) & (places < n - largest), expert.to(wide), base.to(wide))

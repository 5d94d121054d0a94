"""Fisher-weighted averaging (arXiv 2111.09832)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Model, Site, anchor
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.errors import ConfigError, ShapeMismatchError


def fisher_norms(model: Model) -> tuple[float, ...]:
    """`||F_t||` over the whole model, or 1 for each expert without `normalize`."""
    normalize = model.constant("normalize")
    added = model.constant("floor") if model.constant("floor_by") == "add" else None
    squares: list[float] = []
    for site in model.sites():
        squares = squares or [0.0] * len(site.experts)
        if normalize and site.fishers:
            for t, fisher in enumerate(site.fishers):
                squares[t] += float(fisher.double().square().sum())
    if not normalize:
        return (1.0,) * len(squares)
    norms = [math.sqrt(square) + own for square, own in zip(squares, added or [0.0] * len(squares), strict=True)]
    for t, norm in enumerate(norms):
        if not norm > 0:
            raise ConfigError(
                f"fisher: the Fisher information of expert {t} is 0 everywhere, so it cannot be normalized. Collect it again, or set"
                " normalize: false."
            )
    # The last digits depend on how the tensors came in parts; the merged weights must not.
    return tuple(float(f"{norm:.12g}") for norm in norms)


@anchor(
    scope="model",
    elementwise=True,
    needs="fishers",
    reduce=fisher_norms,
    paper="Matena and Raffel 2022, arXiv 2111.09832",
)
def fisher(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    state: tuple[float, ...],
    weight: PerExpert[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = each(1.0),
    normalize: bool = True,
    floor: PerExpert[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = each(1e-6),
    floor_by: Literal["max", "add"] = "max",
) -> Tensor:
    """`W = sum_t c_t F_t W_t / sum_t c_t F_t`, entry by entry, F_t the diagonal of expert t's Fisher information.

    `weight`: c_t. `normalize`: divide c_t by the norm of F_t over the whole model, so that no expert counts more for its sharper likelihood.
    `floor`: the least value of F_t ("max", its authors' form) or what is added to it ("add", as in MergeLM and FusionBench, there also to the
    norm); a floor on the first expert and 0 on the others is its authors' `favor_target_model`. Where all F_t are 0, and for tensors that have
    none (buffers), the result is the weighted mean.
    """
    if not any(weight):
        raise ConfigError(f"{site.name}: the weights {list(weight)} are all 0; give one expert a positive weight.")
    if site.fishers and len(site.fishers) != len(experts):
        raise ConfigError(
            f"{site.name}: {len(site.fishers)} Fisher tensors for {len(experts)} experts; give one for each."
        )
    first = experts[0].double()
    moves = [expert.double() - first for expert in experts]
    center = sum(c * move for c, move in zip(weight, moves, strict=True)) / math.fsum(weight)
    information = [torch.ones_like(first)] * len(experts)
    if site.fishers:
        information = [_floored(f, base, own, floor_by, site.name) for f, own in zip(site.fishers, floor, strict=True)]
        weight = [c / norm for c, norm in zip(weight, state, strict=True)]
    # Around the mean, so that entries without information stay there.
    total, pull = torch.zeros_like(first), torch.zeros_like(first)
    for move, own, c in zip(moves, information, weight, strict=True):
        total.add_(own, alpha=c)
        pull.addcmul_(own, move - center, value=c)
    pull.div_(torch.where(total > 0, total, 1.0))
    return pull.add_(center).add_(first).to(base.dtype)


def _floored(fisher: Tensor, base: Tensor, floor: float, floor_by: str, name: str) -> Tensor:
    if fisher.shape != base.shape:
        raise ShapeMismatchError(
            f"{name}: its Fisher information has shape {tuple(fisher.shape)}, the tensor {tuple(base.shape)}; was it measured on another model?"
        )
    wide = fisher.double()
    return wide.clamp(min=floor) if floor_by == "max" else wide + floor

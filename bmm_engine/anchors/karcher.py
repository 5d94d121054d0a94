"""Karcher mean: the Riemannian centre of the experts' directions on the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.domains import NonNegative
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.anchors.sphere import Origin, exponential, spherical_mean, tangent_mean
from bmm_engine.errors import ConfigError


@anchor(scope="tensor", paper="Karcher 1977, doi 10.1002/cpa.3160300502; arXiv 2603.04972")
def karcher(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    weight: PerExpert[NonNegative] = each(1.0),
    origin: Origin = "zero",
    steps: Annotated[int, Field(ge=0)] = 10,
    tolerance: Annotated[float, Field(gt=0)] = 1e-5,
) -> Tensor:
    """`W = (sum_t w_t |W_t|) u` with `u` the point of the unit sphere that minimises `sum_t w_t angle(u, W_t)^2`.

    Gradient steps `u <- exp_u(sum_t w_t log_u(W_t / |W_t|))` from the mean direction: at most `steps`, until one is shorter than `tolerance`.
    `weight`: each expert's share, divided by their sum. `origin`: "zero" for the experts themselves, "base" for their task vectors. The base is
    not one of the points. A zero vector has no direction and only counts in the mean length. Raises `ConfigError` if the directions cancel out;
    two opposite vectors are averaged linearly instead.
    """
    total = sum(weight)
    if not total:
        raise ConfigError(f"karcher: the weights {list(weight)} sum to 0; give one above 0.")
    shares = torch.tensor(weight, dtype=torch.float64, device=base.device) / total

    def descend(cosines: Tensor, lengths: Tensor, mean: Tensor) -> Tensor:
        directed = torch.where(lengths > 0, shares, 0.0)
        directed = directed / directed.sum()
        for _ in range(steps):
            step = tangent_mean(cosines, mean, directed)
            if float(step @ cosines @ step) < tolerance**2:
                break
            mean = exponential(cosines, mean, step)
        return mean

    return spherical_mean(experts, base if origin == "base" else None, shares, site.name, descend)

"""Multi-SLERP: one step of barycentric interpolation on the sphere (mergekit's method)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.anchors.sphere import Origin, exponential, spherical_mean, tangent_mean
from bmm_engine.errors import ConfigError


@anchor(scope="tensor", paper="mergekit multislerp; goddard.blog/posts/multislerp-wow-what-a-cool-idea")
def multislerp(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    weight: PerExpert[float] = each(1.0),
    normalize: bool = True,
    origin: Origin = "base",
    tangent: Literal["projection", "log"] = "projection",
) -> Tensor:
    """Average the task vectors' directions on the sphere, and their lengths by themselves: `W = W_0 + (sum_t w_t |v_t|) u`.

    With `m` the direction of `sum_t w_t v_t / |v_t|`, the points are taken to the tangent space at `m`, averaged there, and the average is
    taken back by the exponential map, which gives `u`. `tangent`: "projection", as published, takes them there orthogonally; their average is
    then 0 by the choice of `m`, and `u = m`. "log" uses the logarithm, and is slerp exactly for two experts.

    `weight`: each expert's share; `normalize`: divide them by their sum. `origin`: "base" for task vectors, "zero" for the experts themselves.
    A zero vector has no direction and only counts in the mean length. Raises `ConfigError` if the weighted directions cancel out; two opposite
    vectors are averaged linearly instead.
    """
    total = sum(weight)
    if normalize and not total:
        raise ConfigError(f"multislerp: the weights {list(weight)} sum to 0; change one, or set normalize: false.")
    shares = torch.tensor(weight, dtype=torch.float64, device=base.device) / (total if normalize else 1.0)

    def there_and_back(cosines: Tensor, lengths: Tensor, mean: Tensor) -> Tensor:
        return exponential(cosines, mean, tangent_mean(cosines, mean, shares)) if tangent == "log" else mean

    return spherical_mean(experts, base if origin == "base" else None, shares, site.name, there_and_back)

"""Spherical linear interpolation between the base and one expert (Shoemake 1985), over the whole tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.domains import Share
from bmm_engine.anchors.sphere import interpolate


@anchor(scope="tensor", experts=(1, 1), symmetric=False, paper="Shoemake 1985, doi 10.1145/325165.325242")
def slerp(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    t: float = 0.5,
    threshold: Share = 0.9995,
) -> Tensor:
    """`W = (sin((1-t) theta) W_0 + sin(t theta) W_1) / sin theta`, theta the angle between base and expert as vectors.

    `t`: 0 is the base, 1 the expert. `threshold`: where `abs(cos theta)` is above it the straight line is taken, as is common practice; with 1,
    only where there is no arc (parallel, opposite or zero tensors).
    """
    return interpolate(base, experts[0], t, linear_above=threshold)

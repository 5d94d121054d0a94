"""NuSLERP: spherical interpolation between two experts, or between their task vectors (mergekit's method; slerp is Shoemake 1985)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.anchors.sphere import Origin, Vectors, interpolate
from bmm_engine.errors import ConfigError


@anchor(scope="tensor", experts=(2, 2), paper="mergekit nuslerp; Shoemake 1985, doi 10.1145/325165.325242")
def nuslerp(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    weight: PerExpert[float] = each(1.0),
    origin: Origin = "base",
    vectors: Vectors = "tensor",
) -> Tensor:
    """Slerp from the first of two experts to the second, `t = w_2 / (w_1 + w_2)`, seen from the base (or from zero).

    `weight`: each expert's share. `origin`: "base" interpolates the task vectors and adds the base, "zero" the experts themselves. `vectors`:
    the whole tensor is one vector, or each of its rows (outputs), or each of its columns, has an angle of its own.
    """
    total = weight[0] + weight[1]
    if not total:
        raise ConfigError(f"nuslerp: the weights {list(weight)} sum to 0; change one.")
    start = base if origin == "base" else None
    return interpolate(experts[0], experts[1], weight[1] / total, origin=start, vectors=vectors)

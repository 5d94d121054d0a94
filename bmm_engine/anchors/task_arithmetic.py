"""Task arithmetic (arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.anchors.sparse import linear_scale
from bmm_engine.ops.blend import blend


@anchor(scope="tensor", elementwise=True, stored=True, paper="Ilharco et al. 2023, arXiv 2212.04089")
def task_arithmetic(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    scaling: float = 0.3,
    weight: PerExpert[float] = each(1.0),
    normalize: bool = False,
) -> Tensor:
    """`W = W_0 + a sum_t w_t (W_t - W_0)`, `a = scaling`.

    `weight`: w_t, below 0 to unlearn a task. `normalize`: divide by the sum of the weights.
    """
    return blend(base, experts, weights=weight, scaling=linear_scale(weight, scaling, normalize))

"""Weight average (model soup, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.errors import ConfigError, NonFiniteWeightError
from bmm_engine.ops.blend import blend


@anchor(scope="tensor", elementwise=True, stored=True, paper="Wortsman et al. 2022, arXiv 2203.05482")
def average(
    base: Tensor, experts: Sequence[Tensor], *, weight: PerExpert[float] = each(1.0), normalize: bool = True
) -> Tensor:
    """`W = sum_t w_t W_t / sum_t w_t`: the base does not count.

    `weight`: w_t. `normalize`: without it, the plain weighted sum.
    """
    if not normalize:
        return blend(torch.zeros_like(base), experts, weights=weight)
    total = sum(weight)
    if not total:
        raise ConfigError(f"average: the weights {list(weight)} sum to 0; change one, or set normalize: false.")
    # From the first expert on, so that equal experts give themselves to the last bit.
    first, others = experts[0], experts[1:] or experts
    try:
        return blend(first, others, weights=[w / total for w in weight[1:] or weight])
    except NonFiniteWeightError as error:
        raise NonFiniteWeightError(str(error), index=1 if error.index is None else error.index + 1) from error

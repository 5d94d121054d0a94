"""Weight average (model soup, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.errors import ConfigError


@anchor(scope="tensor", elementwise=True, paper="Wortsman et al. 2022, arXiv 2203.05482")
def average(base: Tensor, experts: Sequence[Tensor], *, weights: list[float] | None = None) -> Tensor:
    """`W = sum_t w_t W_t / sum_t w_t`; all `w_t` are 1 by default."""
    if weights is None:
        weights = [1.0] * len(experts)
    if len(weights) != len(experts) or not sum(weights):
        raise ConfigError(
            f"average: {len(weights)} weights (sum {sum(weights)}) for {len(experts)} experts; give one each, not summing to 0."
        )
    out = torch.zeros_like(base)
    for expert, weight in zip(experts, weights, strict=True):
        out.add_(expert, alpha=weight)
    return out.div_(sum(weights))

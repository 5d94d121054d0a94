"""How much experts agree on a module, from their task vectors alone, and how far a merge is taken where they do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.solving.frobenius import squared_norm
from bmm_engine.solving.moments import BLOCK_ROWS

SHRINKAGE = 0.2
"""Of a merge without data, where its recipe says none: chosen on text8 and vision4, where 0.1 and 0 were tried beside it."""


def agreement(base: Tensor, experts: Sequence[Tensor]) -> float:
    """`r = ||mean_t U_t||_F^2 / mean_t ||U_t||_F^2` in [0, 1], `U_t = W_t - W_0` (out, in): 1 for equal experts (and where none changed anything),
    about 1 / T for T that share nothing. Float64 sums, by rows."""
    within, between = 0.0, 0.0
    for start in range(0, len(base), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        own = [expert[rows].double() - base[rows].double() for expert in experts]
        within += sum(map(squared_norm, own)) / len(own)
        between += squared_norm(torch.stack(own).mean(0))
    return min(1.0, between / within) if within > 0 else 1.0


def shrunk(scale: float, shrinkage: float, base: Tensor, experts: Sequence[Tensor]) -> float:
    """`s (1 - shrinkage (1 - r))`: what experts do not agree on disturbs the other tasks in every layer, so it is not taken quite as far. One expert,
    or equal ones, are not shrunk."""
    return scale if shrinkage == 0 else scale * (1 - shrinkage * (1 - agreement(base, experts)))

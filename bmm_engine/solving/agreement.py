"""How much experts agree on a module, from their task vectors alone, and how far a merge is taken where they do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.parallel import one_thread


def agreement(base: Tensor, experts: Sequence[Tensor]) -> float:
    """`r = ||mean_t U_t||_F^2 / mean_t ||U_t||_F^2` in [0, 1], `U_t = W_t - W_0` (out, in): 1 for equal experts (and where none changed anything),
    about 1 / T for T that share nothing. Float64 sums, by rows."""
    within, between = 0.0, 0.0
    with one_thread():  # a sum of all elements is cut by threads
        for start in range(0, len(base), _ROWS):
            rows = slice(start, start + _ROWS)
            own = [expert[rows].double() - base[rows].double() for expert in experts]
            within += sum(float(u.square().sum()) for u in own) / len(own)
            between += float((torch.stack(own).sum(0) / len(own)).square().sum())
    return min(1.0, between / within) if within > 0 else 1.0


def shrunk(scale: float, shrinkage: float, base: Tensor, experts: Sequence[Tensor]) -> float:
    """`s (1 - shrinkage (1 - r))`: what experts do not agree on disturbs the other tasks in every layer, so it is not taken quite as far. One expert,
    or equal ones, are not shrunk."""
    return scale if shrinkage == 0 else scale * (1 - shrinkage * (1 - agreement(base, experts)))


_ROWS = 512

"""Arcee Fusion: take over the expert's entries whose change matters most (mergekit's method)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.anchors.contract import anchor

_EPS = 1e-8
_SLAB = 1 << 18


@anchor(scope="tensor", experts=(1, 1), symmetric=False, paper="mergekit arcee_fusion; arcee.ai")
def arcee_fusion(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """The expert's entries whose importance is at least the tensor's median + 1.5 interquartile ranges, the base's elsewhere.

    The importance of an entry is `abs(W_1 - W_0)` times its row's `KL(softmax(W_1) | softmax(W_0))`, in float64 (the rows differ little, and
    the divergence is what is left of terms that cancel). The quantiles are order statistics, of all entries, rounded down.
    """
    expert = experts[0]
    if base.numel() == 0:
        return base.clone()
    rows = base.reshape(1) if base.dim() == 0 else base
    importance = torch.empty(rows.shape, dtype=torch.float64, device=base.device).view(-1, rows.shape[-1])
    height = max(1, _SLAB // rows.shape[-1])
    slabs = (t.reshape(importance.shape).split(height) for t in (importance, expert, rows))
    for part, new, old in zip(*slabs, strict=True):
        p, q = (torch.softmax(slab.double(), dim=-1) + _EPS for slab in (new, old))
        part.copy_((new.double() - old.double()).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True))
    q1, median, q3 = (_order_statistic(importance, share) for share in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (q3 - q1)
    return torch.where(importance.view(base.shape) >= threshold, expert, base)


def _order_statistic(values: Tensor, share: float) -> Tensor:
    return values.flatten().kthvalue(int(share * (values.numel() - 1)) + 1).values

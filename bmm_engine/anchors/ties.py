"""TIES: trim, elect sign, disjoint merge (arXiv 2306.01708), over the whole model's flat task vectors as its authors do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Stream, anchor
from bmm_engine.anchors.select import kth_smallest_magnitudes


@dataclass(frozen=True)
class TiesState:
    """Per task the magnitude below which entries are trimmed; the sign that entries without a majority take (over the whole model)."""

    thresholds: tuple[float, ...]
    majority: float


def elect(stream: Stream, *, density: float, scaling: float) -> TiesState:
    """Two things need the whole model: each task's magnitude threshold, and the majority sign."""
    thresholds = kth_smallest_magnitudes(
        lambda: ([e - base for e in experts] for _, base, experts in stream()),
        lambda n: n - int(n * density),
    )
    balance = 0
    for _, base, experts in stream():
        balance += int(_trimmed_sum(base, experts, thresholds).sign().sum(dtype=torch.float64))
    return TiesState(thresholds, 1.0 if balance > 0 else -1.0)


@anchor(scope="model", reduce=elect, paper="Yadav et al. 2023, arXiv 2306.01708")
def ties(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    state: TiesState,
    density: Annotated[float, Field(gt=0, le=1)] = 0.2,
    scaling: float = 1.0,
) -> Tensor:
    """Keep each task's top `density` share by magnitude, elect a sign per entry, average the entries that agree: `W_0 + scaling * m`."""
    sign = _trimmed_sum(base, experts, state.thresholds).sign()
    sign = torch.where(sign == 0, state.majority, sign)
    total, count = torch.zeros_like(base), torch.zeros_like(base)
    for expert, threshold in zip(experts, state.thresholds, strict=True):
        kept = _trim(expert - base, threshold)
        agreeing = torch.where(kept.sign() == sign, kept, 0.0)
        total += agreeing
        count += agreeing != 0
    return base + scaling * total / count.clamp_(min=1)


def _trim(tau: Tensor, threshold: float) -> Tensor:
    return torch.where(tau.abs().float() >= threshold, tau, 0.0)


def _trimmed_sum(base: Tensor, experts: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    out = torch.zeros_like(base)
    for expert, threshold in zip(experts, thresholds, strict=True):
        out += _trim(expert - base, threshold)
    return out

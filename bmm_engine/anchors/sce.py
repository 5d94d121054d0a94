"""SCE: select by variance, weigh by energy, erase minority signs (arXiv 2408.07990)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.select import keep_exactly

# Worked on at a time in float64.
_CHUNK = 1 << 20


@anchor(scope="tensor", paper="Wan et al. 2024, arXiv 2408.07990")
def sce(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    select_topk: Annotated[float, Field(ge=0, le=1)] = 1.0,
    scaling: float = 1.0,
    epsilon: Annotated[float, Field(ge=0)] = 0.0,
) -> Tensor:
    """`W = W_0 + scaling sum_t w_t M_t tau_t / sum_t w_t M_t`, where tau_t has the sign M_t of the sum and `w_t = mean tau_t^2 / sum_s mean tau_s^2`.

    `select_topk`: only this share of the tensor's entries counts, those where the tasks vary most (of the entries where they vary at all).
    `epsilon`: the least denominator; where the sum of mean tau_s^2 is below it, the weights are equal. mergekit has 1e-6, which task vectors of
    a usual fine-tuning (1e-4 an entry) do not reach; 0 is the formula itself.
    """
    taus = [expert - base for expert in experts]
    if select_topk < 1:
        selected = _most_varying(taus, select_topk)
        taus = [torch.where(selected, tau, 0.0) for tau in taus]
    total = torch.zeros_like(base)
    for tau in taus:
        total += tau
    positive = total >= 0
    energies = [sum(float(piece.double().square().sum()) for piece in tau.reshape(-1).split(_CHUNK)) for tau in taus]
    energy = sum(energies)
    weights = (
        [e / energy for e in energies]
        if energy > 0 and energy / base.numel() >= epsilon
        else [1 / len(taus)] * len(taus)
    )
    merged, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for tau, weight in zip(taus, weights, strict=True):
        agrees = torch.where(positive, tau > 0, tau < 0)
        merged += torch.where(agrees, weight * tau, 0.0)
        divisor += weight * agrees
    divisor = divisor.clamp_(min=epsilon)
    return base + scaling * torch.where(divisor > 0, merged / divisor, 0.0)


def _most_varying(taus: Sequence[Tensor], share: float) -> Tensor:
    """Where the variance over the tasks is among the `share` largest of those above 0, exactly so many, the earlier of equals."""
    deviation = torch.empty_like(taus[0], dtype=torch.float32, memory_format=torch.contiguous_format)
    for piece, *parts in zip(
        deviation.view(-1).split(_CHUNK), *(tau.reshape(-1).split(_CHUNK) for tau in taus), strict=True
    ):
        stacked = torch.stack(parts).double()
        # In the order of the variance, and in float32's range where tau is.
        piece.copy_((stacked - stacked.mean(0)).square_().mean(0).sqrt_())
    kept = int(int(deviation.count_nonzero()) * share)
    if kept == 0:
        return torch.zeros_like(deviation, dtype=torch.bool)
    left, least, _ = keep_exactly(torch.zeros_like(deviation), deviation, deviation.numel() - kept, 0)
    return left >= least

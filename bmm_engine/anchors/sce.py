"""SCE: select by variance, weigh by energy, erase minority signs (arXiv 2408.07990)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.domains import NonNegative, Share
from bmm_engine.anchors.select import difference, exact_bounds
from bmm_engine.anchors.sparse import not_finite

# Elements worked on at a time.
_PIECE = 1 << 18


@dataclass(frozen=True)
class _Selection:
    """Entries that count: those whose `deviation` over the tasks is at least `least`, less some of the equals; all without a deviation."""

    deviation: Tensor | None = None
    least: float = 0.0
    dropped: Tensor | None = None


@anchor(scope="tensor", stored=True, paper="Wan et al. 2024, arXiv 2408.07990")
def sce(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    select_topk: Share = 1.0,
    scaling: float = 1.0,
    epsilon: NonNegative = 0.0,
) -> Tensor:
    """`W = W_0 + scaling sum_t w_t M_t tau_t / sum_t w_t M_t`, where tau_t has the sign M_t of the sum and `w_t = mean tau_t^2 / sum_s mean tau_s^2`.

    `select_topk`: only this share of the tensor's entries counts, those where the tasks vary most (of the entries where they vary at all).
    `epsilon`: the least denominator; where the sum of mean tau_s^2 is below it, the weights are equal. mergekit has 1e-6, which task vectors of
    a usual fine-tuning (1e-4 an entry) do not reach; 0 is the formula itself.
    """
    selection = _most_varying(base, experts, select_topk) if select_topk < 1 else _Selection()
    energies = [0.0] * len(experts)
    for _, taus in _pieces(base, experts, selection):
        for t, tau in enumerate(taus):
            energies[t] += float(tau.square().sum(dtype=torch.float64))
    energy = sum(energies)
    weights = (
        [e / energy for e in energies]
        if energy > 0 and energy / base.numel() >= epsilon
        else [1 / len(experts)] * len(experts)
    )
    wide = torch.float64 if any(t.dtype == torch.float64 for t in (base, *experts)) else torch.float32
    out = base.to(wide, copy=True).contiguous()
    flat = out.view(-1)
    for start, taus in _pieces(base, experts, selection):
        flat[start : start + len(taus[0])] += scaling * _merged(taus, weights, epsilon)
    return out


def _merged(taus: Sequence[Tensor], weights: Sequence[float], epsilon: float) -> Tensor:
    total = torch.zeros_like(taus[0])
    for tau in taus:
        total += tau
    positive = total >= 0
    merged, divisor = torch.zeros_like(taus[0]), torch.zeros_like(taus[0])
    for tau, weight in zip(taus, weights, strict=True):
        agrees = torch.where(positive, tau > 0, tau < 0)
        merged += torch.where(agrees, weight * tau, 0.0)
        divisor += weight * agrees
    divisor = divisor.clamp_(min=epsilon)
    return torch.where(divisor > 0, merged / divisor, 0.0)


def _pieces(base: Tensor, experts: Sequence[Tensor], selection: _Selection) -> Iterator[tuple[int, list[Tensor]]]:
    """(start, task vectors) of each piece, with zeros where entries do not count. Raises `NonFiniteWeightError`."""
    flat_base, flats = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    for start in range(0, len(flat_base), _PIECE):
        own = flat_base[start : start + _PIECE]
        taus = [difference(expert[start : start + _PIECE], own) for expert in flats]
        for t, tau in enumerate(taus):
            if not bool(tau.isfinite().all()):
                raise not_finite(own, t)
        if selection.deviation is not None:
            counts = selection.deviation[start : start + _PIECE] >= selection.least
            if selection.dropped is not None:
                bounds = torch.tensor([start, start + len(own)], device=own.device)
                first, last = torch.searchsorted(selection.dropped, bounds).tolist()
                counts[selection.dropped[first:last] - start] = False
            taus = [torch.where(counts, tau, 0.0) for tau in taus]
        yield start, taus


def _most_varying(base: Tensor, experts: Sequence[Tensor], share: float) -> _Selection:
    """Where the variance over the tasks is among the `share` largest of those above 0, exactly so many, the earlier of equals."""
    deviation = torch.empty(base.numel(), dtype=torch.float32, device=base.device)
    for start, taus in _pieces(base, experts, _Selection()):
        stacked = torch.stack(taus).double()
        # In the order of the variance, and in float32's range where tau is.
        deviation[start : start + len(taus[0])] = (stacked - stacked.mean(0)).square_().mean(0).sqrt_()
    kept = int(int(deviation.count_nonzero()) * share)
    if kept == 0:
        return _Selection(deviation, float("inf"))
    least, _, dropped = exact_bounds(torch.zeros_like(deviation), deviation, len(deviation) - kept, 0)
    return _Selection(deviation, least, dropped)

"""Exact order statistics of magnitudes over a whole model, in bounded memory: two passes of 16-bit histograms, no sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_HALF = 16


def kth_smallest_magnitudes(
    passes: Callable[[], Iterable[Sequence[Tensor]]], rank: Callable[[int], int]
) -> tuple[float, ...]:
    """For each of T parallel streams of tensors, its `rank(n)`-th smallest magnitude (1-based; n its number of entries), in float32.

    `passes()` starts a pass and yields T tensors at a time. A rank below 1 gives 0 (keep everything). Non-negative float32 values order as
    their bit patterns do: the first pass finds the upper 16 bits, the second the lower 16 among the entries that share them.
    """
    upper = _histograms(passes(), lambda bits, t: bits >> _HALF, 1 << 15)
    ranks = [rank(int(h.sum())) for h in upper]
    chosen = [_bin_of(h, k) for h, k in zip(upper, ranks, strict=True)]
    lower = _histograms(passes(), lambda bits, t: (bits & 0xFFFF)[(bits >> _HALF) == chosen[t][0]], 1 << _HALF)
    values = []
    for t, k in enumerate(ranks):
        low, _ = _bin_of(lower[t], chosen[t][1])
        bits = torch.tensor((chosen[t][0] << _HALF) | low, dtype=torch.int32)
        values.append(float(bits.view(torch.float32)) if k >= 1 else 0.0)
    return tuple(values)


def _histograms(tensors: Iterable[Sequence[Tensor]], key: Callable[[Tensor, int], Tensor], size: int) -> list[Tensor]:
    counts: list[Tensor] = []
    for group in tensors:
        counts = counts or [torch.zeros(size, dtype=torch.int64) for _ in group]
        for t, tensor in enumerate(group):
            bits = tensor.abs().float().contiguous().view(torch.int32).reshape(-1)
            counts[t] += torch.bincount(key(bits, t), minlength=size).cpu()
    return counts


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th entry, and its rank within that bin."""
    cumulative = histogram.cumsum(0)
    index = int(torch.searchsorted(cumulative, max(rank, 1)))
    before = int(cumulative[index - 1]) if index else 0
    return index, max(rank, 1) - before

"""Exact order statistics of magnitudes over a whole model, in bounded memory: two passes of 16-bit histograms, no sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bmm_engine.ops.select import LOWER_BINS, UPPER_BINS, add_magnitude_histogram, find_rank, magnitude


def kth_smallest_magnitudes(
    passes: Callable[[], Iterable[Sequence[Tensor]]], rank: Callable[[int], int]
) -> tuple[float, ...]:
    """For each of T parallel streams of tensors, its `rank(n)`-th smallest magnitude (1-based; n its number of entries), in float32.

    `passes()` starts a pass and yields T tensors at a time. A rank below 1 gives 0 (keep everything). The first pass finds the upper 16 bits,
    the second the lower 16 among the entries that share them.
    """
    upper = _histograms(passes(), None)
    ranks = [rank(int(counts.sum())) for counts in upper]
    chosen = [find_rank(counts, k) if k >= 1 else None for counts, k in zip(upper, ranks, strict=True)]
    lower = _histograms(passes(), [bin_and_rank and bin_and_rank[0] for bin_and_rank in chosen])
    values = []
    for counts, bin_and_rank in zip(lower, chosen, strict=True):
        if bin_and_rank is None:
            values.append(0.0)
        else:
            values.append(magnitude(bin_and_rank[0], find_rank(counts, bin_and_rank[1])[0]))
    return tuple(values)


def _histograms(tensors: Iterable[Sequence[Tensor]], chosen: Sequence[int | None] | None) -> list[Tensor]:
    """Per stream: counts of the upper halves, or, with `chosen`, of the lower halves under its chosen upper one (if any)."""
    counts: list[Tensor] = []
    size = UPPER_BINS if chosen is None else LOWER_BINS
    for group in tensors:
        counts = counts or [torch.zeros(size, dtype=torch.int64, device=tensor.device) for tensor in group]
        for t, tensor in enumerate(group):
            if chosen is None or chosen[t] is not None:
                add_magnitude_histogram(counts[t], tensor, None if chosen is None else chosen[t])
    return [c.cpu() for c in counts]

"""Exact order statistics of magnitudes, over a tensor or a whole model, in bounded memory: two passes of 16-bit histograms, no sort."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmm_engine.anchors.contract import Model, Site
from bmm_engine.ops.select import LOWER_BINS, UPPER_BINS, add_magnitude_histogram, find_rank, magnitude

_PIECE = 1 << 20

# A tensor, or (x, minus) for x - minus.
Values = Tensor | tuple[Tensor, Tensor]
# Groups of one such for each of T parallel streams.
Groups = Iterable[Sequence[Values]]
Counts = list[list[Tensor]]
# Gives all groups of a pass, part by part, to the function, and its results back.
Pass = Callable[[Callable[[Groups], Counts]], Iterable[Counts]]


def over(model: Model, groups: Callable[[Site], Groups]) -> Pass:
    """A pass over a model, several of its sites at a time."""
    return lambda count: model.map(lambda site: count(groups(site)))


@dataclass(frozen=True)
class OrderStatistic:
    """The entry of some rank: its magnitude, its place (1-based) among the entries that share it, and how many those are."""

    value: float
    place: int
    equals: int


# What a rank below 1 stands for: everything is larger.
_BELOW_ALL = OrderStatistic(0.0, 0, 0)


def order_statistics(values: Pass, ranks: Sequence[Sequence[Callable[[int], int]]]) -> list[tuple[OrderStatistic, ...]]:
    """For each of T parallel streams of tensors, its entries of the ranks `rank(n)` for `rank` in `ranks[t]`.

    Ranks count from 1, the smallest magnitude, in float32; n is the stream's number of entries. A rank below 1, or of nothing, gives the value 0.
    Of two passes over the values the first finds the upper 16 bits, the second the lower 16 among the entries that share them. NaN counts as
    infinity, for whoever computes with these entries to refuse.
    """
    upper = _histograms(values, [[None]] * len(ranks))
    sizes = [int(counts[0].sum()) for counts in upper]
    wanted = [[rank(n) for rank in own] for own, n in zip(ranks, sizes, strict=True)]
    bins = [
        [find_rank(counts[0], k) if k >= 1 and n else None for k in own]
        for own, counts, n in zip(wanted, upper, sizes, strict=True)
    ]
    chosen = [sorted({found[0] for found in own if found is not None}) for own in bins]
    lower = _histograms(values, chosen)
    return [
        tuple(_BELOW_ALL if found is None else _resolved(found, counts[own.index(found[0])]) for found in founds)
        for founds, own, counts in zip(bins, chosen, lower, strict=True)
    ]


def kth_smallest_magnitudes(values: Pass, rank: Sequence[Callable[[int], int]]) -> tuple[float, ...]:
    """The values alone of `order_statistics` with one rank for each stream."""
    return tuple(own[0].value for own in order_statistics(values, [[own] for own in rank]))


def exact_bounds(base: Tensor, expert: Tensor, smallest: int, largest: int) -> tuple[float, float, Tensor | None]:
    """(lower, upper, dropped): all but so many smallest and largest entries of |expert - base| are those within the bounds that are not dropped.

    Of equal magnitudes (16-bit weights have many) the earlier entry counts as the larger. Where bounds alone cannot tell equals apart, `dropped`
    holds the flat indices of those to leave out, sorted; else it is None.
    """
    n = base.numel()
    (low, high), *_ = order_statistics(
        lambda count: [count([[(expert, base)]])],
        [[lambda n: smallest + 1 if smallest else 0, lambda n: n - largest if largest else 0]],
    )
    lower, upper = low.value, high.value if largest else math.inf
    dropped: list[Tensor] = []
    if lower > 0 and low.place > 1:
        dropped.append(_equals(base, expert, lower)[low.equals - low.place + 1 :])
    if largest and high.place < high.equals:
        dropped.append(_equals(base, expert, upper)[: high.equals - high.place])
    if not dropped or smallest + largest >= n:
        return lower, upper, None
    return lower, upper, torch.cat(dropped).sort().values


def difference(expert: Tensor, base: Tensor) -> Tensor:
    """expert - base, in float64 if either is, else in float32."""
    wide = torch.promote_types(torch.promote_types(expert.dtype, base.dtype), torch.float32)
    return expert.to(wide) - base.to(wide)


def just_above(value: float) -> float:
    """The float32 after `value` rounded to float32: as an inclusive bound, what `> value` is."""
    return float(torch.nextafter(torch.tensor(value, dtype=torch.float32), torch.tensor(math.inf)))


def _equals(base: Tensor, expert: Tensor, value: float) -> Tensor:
    """Flat indices of the entries of that magnitude, found a piece at a time."""
    found = [
        (difference(own, other).abs().float() == value).nonzero().view(-1) + start
        for start, own, other in zip(
            range(0, base.numel(), _PIECE),
            expert.reshape(-1).split(_PIECE),
            base.reshape(-1).split(_PIECE),
            strict=True,
        )
    ]
    return torch.cat(found)


def _resolved(found: tuple[int, int], counts: Tensor) -> OrderStatistic:
    upper, rank = found
    lower, place = find_rank(counts, rank)
    value = magnitude(upper, lower)
    return OrderStatistic(math.inf if math.isnan(value) else value, place, int(counts[lower]))


def _histograms(values: Pass, chosen: Sequence[Sequence[int | None]]) -> Counts:
    """Per stream, for each of its `chosen`: counts of the upper halves (None), or of the lower halves under that upper one."""
    totals = _zeros(chosen)
    for counts in values(lambda groups: _count(groups, chosen)):
        for own_totals, own in zip(totals, counts, strict=True):
            for total, count in zip(own_totals, own, strict=True):
                total += count
    return totals


def _zeros(chosen: Sequence[Sequence[int | None]]) -> Counts:
    return [
        [torch.zeros(UPPER_BINS if own is None else LOWER_BINS, dtype=torch.int64) for own in owns] for owns in chosen
    ]


def _count(groups: Groups, chosen: Sequence[Sequence[int | None]]) -> Counts:
    counts = _zeros(chosen)
    for group in groups:
        pairs = [item if isinstance(item, tuple) else (item, None) for item in group]
        counts = [[count.to(x.device) for count in own] for own, (x, _) in zip(counts, pairs, strict=True)]
        for (x, minus), owns, own_counts in zip(pairs, chosen, counts, strict=True):
            for own, count in zip(owns, own_counts, strict=True):
                add_magnitude_histogram(count, x, own, minus=minus)
    return [[count.cpu() for count in own] for own in counts]

"""`W_0 + a combine_t(v_t)` in plain torch: the specification, for any float dtype and device.

Every operation is rounded by itself, in the order in which it is written here; the kernels give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bmm_engine.ops.blend.rule import Part, Rule

_CHUNK = 1 << 22  # elements worked on at a time: a few temporaries for each expert

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def supports(tensors: Sequence[Tensor]) -> str | None:
    return None


def blend(base: Tensor, experts: Sequence[Tensor], rule: Rule, out: Tensor) -> int | None:
    """Writes `out`; returns the index of the first input that is not finite (0 is base), or None."""
    result = (
        out.view(-1) if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format).view(-1)
    )
    flags = []
    for start, b, xs, ranks, finite in _chunks(base, experts, rule.parts):
        flags.append(finite)
        m = _combined(b, xs, ranks, rule, start)
        result[start : start + len(b)] = b + m * rule.scaling
    if not out.is_contiguous():
        out.copy_(result.view(out.shape))
    return _first_not_finite(flags)


def sign_balance(base: Tensor, experts: Sequence[Tensor], parts: Sequence[Part]) -> tuple[int | None, int]:
    """(as `blend` returns it, the sum of the signs)."""
    flags, balance = [], torch.zeros((), dtype=torch.int64, device=base.device)
    for start, b, xs, ranks, finite in _chunks(base, experts, parts):
        flags.append(finite)
        vs = [_kept(x - b, part, rank, start)[0] * part.factor for x, part, rank in zip(xs, parts, ranks, strict=True)]
        balance += _sum(vs).sign().sum(dtype=torch.int64)
    return _first_not_finite(flags), int(balance)


def magnitude_sums(
    base: Tensor, experts: Sequence[Tensor], parts: Sequence[Part], first: int
) -> tuple[int | None, list[tuple[float, float]]]:
    """(as `blend` returns it, per expert the sums of |d| over all elements and over those that are kept, in float64)."""
    flags, sums = [], [(0.0, 0.0)] * len(experts)
    for start, b, xs, ranks, finite in _chunks(base, experts, parts):
        flags.append(finite)
        for t, (x, part, rank) in enumerate(zip(xs, parts, ranks, strict=True)):
            kept, _ = _kept(x - b, part, rank, first + start)
            found = [float(d.abs().sum(dtype=torch.float64)) for d in (x - b, kept)]
            sums[t] = sums[t][0] + found[0], sums[t][1] + found[1]
    return _first_not_finite(flags), sums


def uniform(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """(count,) float32: the number in [0, 1) that `seed` has for each element from `first` on.

    SplitMix64 (Steele, Lea, Flood 2014) of seed + (index + 1) * golden, its upper 24 bits; in wrapping int64.
    """
    z = torch.arange(count, dtype=torch.int64, device=device)
    z = z * _signed(_GOLDEN) + _signed(seed + (first + 1) * _GOLDEN)
    for shift, factor in _MIX:
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 40).float() * 2.0**-24


def _signed(value: int) -> int:
    """The int64 with the lower 64 bits of `value`."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits with zeros shifted in."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _chunks(
    base: Tensor, experts: Sequence[Tensor], parts: Sequence[Part]
) -> Iterator[tuple[int, Tensor, list[Tensor], list[Tensor | None], Tensor]]:
    """(start, base, experts, ranks, which inputs are finite) chunk by chunk, widened to the dtype of the sums."""
    tensors = [base, *experts]
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    flat = [tensor.reshape(-1) for tensor in tensors]
    ranks = [None if part.ranks is None else part.ranks.reshape(-1) for part in parts]
    for start in range(0, base.numel(), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        b, *xs = (tensor[chunk].to(dtype) for tensor in flat)
        finite = torch.stack([x.isfinite().all() for x in (b, *xs)])
        yield start, b, xs, [None if rank is None else rank[chunk] for rank in ranks], finite


def _kept(d: Tensor, part: Part, ranks: Tensor | None, index: int, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """d with zeros where it is not kept, and where it is; `index` is that of d's first element. `inverse`: d over its probability."""
    magnitude = d.abs().float()
    kept = (magnitude >= part.lower) & (magnitude <= part.upper)
    if part.keep is not None:
        low, width = part.keep
        u = uniform(part.seed, index, len(d), d.device)
        probability = torch.full_like(u, low) if ranks is None else ranks * width + low
        kept &= u < probability
        d = d / probability.to(d.dtype) if inverse else d
    return torch.where(kept, d, torch.zeros_like(d)), kept


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(terms[0])
    for term in terms:
        total += term
    return total


def _combined(b: Tensor, xs: Sequence[Tensor], ranks: Sequence[Tensor | None], rule: Rule, start: int) -> Tensor:
    vs, masks = [], []
    for x, part, rank in zip(xs, rule.parts, ranks, strict=True):
        d, kept = _kept(x - b, part, rank, rule.first + start, rule.inverse)
        vs.append(d * part.factor)
        masks.append(kept)
    total = _sum(vs)
    if rule.combine == "sum":
        return total
    if rule.combine == "largest":
        best = torch.zeros_like(total)
        for v in vs:
            best = torch.where(v.abs() >= best.abs(), v, best)
        return best
    if rule.combine == "mean_kept":
        kept = _sum([mask.to(b.dtype) for mask in masks])
        alone = _sum([v * part.unique for v, part in zip(vs, rule.parts, strict=True)])
        return torch.where(kept == 1, alone, total / kept.clamp(min=1))
    if rule.combine == "consensus":
        votes = _sum(
            [(v.abs() > (total - v).abs() * part.dominance).to(b.dtype) for v, part in zip(vs, rule.parts, strict=True)]
        )
        return torch.where(votes >= rule.votes, total, torch.zeros_like(total))
    sign = (total if rule.combine == "elect_sum" else _sum([v.sign() for v in vs])).sign()
    sign = torch.where(sign == 0, torch.full_like(sign, rule.tie), sign)
    agreeing = [v.sign() == sign for v in vs]
    m = _sum([torch.where(agrees, v, torch.zeros_like(v)) for v, agrees in zip(vs, agreeing, strict=True)])
    if rule.normalize:
        weight = _sum([agrees.to(b.dtype) * part.weight for agrees, part in zip(agreeing, rule.parts, strict=True)])
        m = m / torch.where(weight == 0, torch.ones_like(weight), weight)
    return m


def _first_not_finite(flags: Sequence[Tensor]) -> int | None:
    if not flags:
        return None
    finite = torch.stack(list(flags)).all(dim=0).tolist()
    return None if all(finite) else finite.index(False)

"""Sparse task vectors: which entries count, and what that does to their norm; a tensor at a time, in pieces that fit the cache and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bmm_engine.anchors.contract import Site
from bmm_engine.errors import NonFiniteWeightError
from bmm_engine.ops.blend import blend, magnitude_sums, sign_balance
from bmm_engine.ops.ranks import magnitude_ranks

# Elements of a piece: what is made for one (ranks, copies) stays small beside the tensor itself. A GPU wants more at a time.
_PIECE = {"cpu": 1 << 20, "cuda": 1 << 26}
# Of a tensor of so many elements all ranks are kept from one pass to the next; those of larger ones are found again.
_KEPT_RANKS = 1 << 23


@dataclass
class Masks:
    """Which entries of each expert's task vector count: bounds and chances as `blend` has them, and single entries that are dropped.

    `dropped`: flat indices, sorted, or None. A pair in `keep` goes by an entry's rank in its row. `scales`: what is left is multiplied by them.
    """

    scales: list[float]
    lower: list[float | None]
    upper: list[float | None]
    keep: list[float | tuple[float, float] | None]
    seeds: list[int]
    dropped: list[Tensor | None] = field(default_factory=list)
    _pieces: list[Piece] = field(
        default_factory=list
    )  # with their ranks, which take longest to find, for their second use

    @classmethod
    def all_of(cls, experts: int) -> Masks:
        """Everything counts."""
        return cls(
            [1.0] * experts, [None] * experts, [None] * experts, [None] * experts, [0] * experts, [None] * experts
        )

    def is_ranked(self) -> bool:
        return any(isinstance(chance, tuple) for chance in self.keep)


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor, flat: from element `start` on. `masks`: the arguments of `blend` for them."""

    start: int
    base: Tensor
    experts: list[Tensor]
    masks: dict[str, Any]


def blend_masked(site: Site, masks: Masks, **options: Any) -> Tensor:
    """`blend` of the site's experts where they count; `options` as of `blend`."""
    tensors = (site.base, *site.experts)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    out = torch.empty(site.base.shape, dtype=wide, device=site.base.device)
    flat = out.view(-1)
    for piece in _pieces(site, masks):
        place = flat[piece.start : piece.start + piece.base.numel()]
        blend(piece.base, piece.experts, scales=masks.scales, out=place, **piece.masks, **options)
    return out


def balance_masked(site: Site, masks: Masks, weights: Sequence[float]) -> int:
    """`sign_balance` of the site's experts where they count; nothing may be left to chance."""
    total = 0
    for piece in _pieces(site, masks):
        bounds = {key: piece.masks[key] for key in ("lower", "upper")}
        total += sign_balance(piece.base, piece.experts, weights=weights, scales=masks.scales, **bounds)
    return total


def without_l1(parameters: Mapping[str, Any]) -> bool:
    """Whether a rule with these parameters needs no tensor as a whole: where no L1 norm is restored, it may get them in parts."""
    return bool(parameters["rescale"] != "l1")


def restore_l1(site: Site, masks: Masks, only: Sequence[bool], whole: Sequence[Tensor] | None = None) -> None:
    """Set the scales of the experts in `only` to what gives what is left of their task vectors the L1 norm it had; to 1 where either is zero.

    `whole`: the experts before anything was taken from them, where those of the site have lost entries already.
    """
    sums = [[0.0, 0.0] for _ in site.experts]
    flat = [expert.reshape(-1) for expert in whole or site.experts]
    if masks.is_ranked() and site.base.numel() <= _KEPT_RANKS:
        masks._pieces = list(_pieces(site, masks))
    for piece in _pieces(site, masks):
        stop = piece.start + piece.base.numel()
        found = magnitude_sums(piece.base, piece.experts, **piece.masks)
        for t, (before, after) in enumerate(found):
            if masks.dropped[t] is not None or whole is not None:  # the piece has lost them
                before = magnitude_sums(piece.base, [flat[t][piece.start : stop]])[0][0]
            sums[t][0] += before
            sums[t][1] += after
    for t, wanted in enumerate(only):
        if wanted:
            before, after = sums[t]
            masks.scales[t] = before / after if before and after else 1.0


def _pieces(site: Site, masks: Masks) -> Iterator[Piece]:
    if masks._pieces:
        yield from masks._pieces
        return
    base, experts = site.base.reshape(-1), [expert.reshape(-1) for expert in site.experts]
    size = len(base)
    width = size // site.base.shape[0] if site.base.dim() > 1 and site.base.shape[0] else size
    ranked = masks.is_ranked()
    # Ranks are within rows: a piece then holds whole ones.
    piece = _PIECE.get(base.device.type, _PIECE["cpu"])
    step = max(1, piece // max(width, 1)) * width if ranked else piece
    for start in range(0, size, max(step, 1)):
        own_base = base[start : start + step]
        owns = [
            _without(expert[start : start + step], own_base, dropped, start)
            for expert, dropped in zip(experts, masks.dropped, strict=True)
        ]
        arguments: dict[str, Any] = {"lower": masks.lower, "upper": masks.upper}
        if any(chance is not None for chance in masks.keep):
            arguments |= {"keep": masks.keep, "seeds": masks.seeds, "first": site.first + start}
        if ranked:
            pairs = [isinstance(chance, tuple) for chance in masks.keep]
            arguments["ranks"] = [
                row_ranks(own_base, own, t, width) if pair else None
                for t, (own, pair) in enumerate(zip(owns, pairs, strict=True))
            ]
        yield Piece(start, own_base, owns, arguments)


def _without(expert: Tensor, base: Tensor, dropped: Tensor | None, start: int) -> Tensor:
    """A piece of an expert with the base's values in what is dropped of it; a copy only where that is anything."""
    if dropped is None:
        return expert
    bounds = torch.tensor([start, start + len(expert)], device=dropped.device)
    first, last = torch.searchsorted(dropped, bounds).tolist()
    if first == last:
        return expert
    places = dropped[first:last] - start
    wide = torch.promote_types(base.dtype, expert.dtype)
    expert = expert.to(wide, copy=True)
    expert[places] = base[places].to(wide)
    return expert


def row_ranks(base: Tensor, expert: Tensor, t: int, width: int) -> Tensor:
    """Ranks from 0 to 1 of |expert - base| within rows of `width`; in base's shape. Raises `NonFiniteWeightError`."""
    rows = (base.numel() // max(width, 1), width)
    try:
        return magnitude_ranks(expert.reshape(rows), base.reshape(rows)).reshape(base.shape)
    except NonFiniteWeightError:
        raise not_finite(base, t) from None


def not_finite(base: Tensor, t: int) -> NonFiniteWeightError:
    """The error for a task vector of expert `t` that is not finite: the base's fault, or the expert's."""
    index = t + 1 if bool(base.isfinite().all()) else 0
    return NonFiniteWeightError(f"{f'experts[{t}]' if index else 'base'} holds NaN or infinity", index=index)


def linear_scale(weight: Sequence[float], scaling: float, normalize: bool) -> float:
    """`scaling`, with `normalize` over the sum of the weights (a sum of about 0 counts as 1)."""
    total = sum(weight)
    return scaling / total if normalize and abs(total) >= 1e-8 else scaling

"""A blend in C++ (csrc/cpu/blend.h): one pass over memory, whatever the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bmm_engine.ops import _native
from bmm_engine.ops.blend.rule import COMBINES, Part, Rule


def supports(tensors: Sequence[Tensor]) -> str | None:
    """`tensors`: all that are read or written."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}, not in CPU memory"
        if not tensor.is_contiguous():
            return f"a tensor is not contiguous: its strides are {tensor.stride()}"
    return _native.cpu_missing()


def blend(base: Tensor, experts: Sequence[Tensor], rule: Rule, out: Tensor, isa: str = "") -> int | None:
    """`isa` names an instruction set; "" is the best that the machine runs."""
    not_finite: int = _native.cpu().blend(
        _native.elements(base),
        _parts(experts, rule.parts),
        COMBINES.index(rule.combine),  # the codes of csrc/cpu/blend.h
        rule.inverse,
        rule.normalize,
        rule.tie > 0,
        rule.votes,
        rule.scaling,
        rule.first % 2**64,
        base.numel(),
        _native.elements(out),
        torch.get_num_threads(),
        isa,
    )
    return None if not_finite < 0 else not_finite


def sign_balance(
    base: Tensor, experts: Sequence[Tensor], parts: Sequence[Part], isa: str = ""
) -> tuple[int | None, int]:
    not_finite, balance = _native.cpu().sign_balance(
        _native.elements(base), _parts(experts, parts), base.numel(), torch.get_num_threads(), isa
    )
    return None if not_finite < 0 else not_finite, balance


def magnitude_sums(
    base: Tensor, experts: Sequence[Tensor], parts: Sequence[Part], first: int, isa: str = ""
) -> tuple[int | None, list[tuple[float, float]]]:
    not_finite, sums = _native.cpu().magnitude_sums(
        _native.elements(base), _parts(experts, parts), first % 2**64, base.numel(), torch.get_num_threads(), isa
    )
    return None if not_finite < 0 else not_finite, sums


def _parts(experts: Sequence[Tensor], parts: Sequence[Part]) -> list[tuple[Any, ...]]:
    """The members of bmm::BlendExpert (csrc/cpu/blend.h) in their order."""
    return [
        (
            _native.elements(expert),
            part.factor,
            part.weight,
            part.lower,
            part.upper,
            part.keep is not None,
            part.seed,
            *(part.keep or (1.0, 0.0)),
            0 if part.ranks is None else part.ranks.data_ptr(),
            part.unique,
            part.dominance,
        )
        for expert, part in zip(experts, parts, strict=True)
    ]

"""`R = sum_t beta_t (W_t - W_a) G_t` in plain torch: the specification, for any dtype and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.ops import _dispatch


def supports(anchor: Tensor, experts: Sequence[Tensor], grams: Sequence[Tensor], out: Tensor) -> str | None:
    return None


def residual(
    anchor: Tensor,
    experts: Sequence[Tensor],
    grams: Sequence[Tensor],
    weights: Sequence[float],
    out: Tensor,
    precision: str,
) -> None:
    """`precision` is ignored: this is always "ieee"."""
    start = anchor.to(out.dtype)
    total = torch.zeros_like(start)
    with _dispatch.exact_matmul():
        for expert, gram, weight in zip(experts, grams, weights, strict=True):
            total.add_((expert.to(out.dtype) - start) @ gram.to(out.dtype), alpha=weight)
    out.copy_(total)

"""`A = sum_t beta_t G_t + lam I`, off-diagonal entries shrunk, in plain torch: the specification, for any dtype and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def supports(grams: Sequence[Tensor], out: Tensor) -> str | None:
    return None


def assemble(
    grams: Sequence[Tensor], weights: Sequence[float], ridges: Sequence[float], shrink: float, out: Tensor
) -> None:
    """`ridges`: one number, or one per member of the batch, leading dimensions flattened."""
    total = torch.zeros_like(out)
    for gram, weight in zip(grams, weights, strict=True):
        total.add_(gram.to(out.dtype), alpha=weight)
    diagonal = total.diagonal(dim1=-2, dim2=-1)
    if shrink != 1:
        kept = diagonal.clone()
        total.mul_(shrink)
        diagonal.copy_(kept)
    if len(ridges) == 1:
        diagonal.add_(ridges[0])
    else:
        diagonal.add_(torch.tensor(ridges, dtype=out.dtype, device=out.device).view(*out.shape[:-2], 1))
    out.copy_(total)

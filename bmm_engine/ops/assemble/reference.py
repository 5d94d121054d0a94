"""`A = sum_t beta_t G_t + lam I` in plain torch: the specification, for any dtype and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def supports(grams: Sequence[Tensor], out: Tensor) -> str | None:
    return None


def assemble(grams: Sequence[Tensor], weights: Sequence[float], ridge: float, out: Tensor) -> None:
    total = torch.zeros_like(out)
    for gram, weight in zip(grams, weights, strict=True):
        total.add_(gram.to(out.dtype), alpha=weight)
    total.diagonal(dim1=-2, dim2=-1).add_(ridge)
    out.copy_(total)

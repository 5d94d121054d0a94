"""Normalised ranks of |x - minus| within rows, in plain torch: the specification, for any float dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(x: Tensor, minus: Tensor | None) -> str | None:
    return None


def magnitude_ranks(x: Tensor, minus: Tensor | None, out: Tensor) -> bool:
    """Writes `out`; returns whether no magnitude is NaN."""
    if minus is not None:
        dtype = torch.float64 if torch.float64 in (x.dtype, minus.dtype) else torch.float32
        x = x.to(dtype) - minus.to(dtype)
    magnitudes = x.abs().float()
    n = x.shape[-1]
    worth = torch.arange(n, dtype=torch.float64, device=x.device).div_(n - 1).float() if n > 1 else out.new_ones(1)
    out.scatter_(-1, magnitudes.argsort(dim=-1, stable=True), worth.expand(x.shape))
    return not bool(magnitudes.isnan().any())

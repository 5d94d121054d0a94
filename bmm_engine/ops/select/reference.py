"""Histograms of magnitudes in plain torch: the specification, for any float dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(counts: Tensor, x: Tensor, minus: Tensor | None = None) -> str | None:
    return None


def add_magnitude_histogram(counts: Tensor, x: Tensor, upper: int | None, minus: Tensor | None = None) -> None:
    if minus is not None:
        dtype = torch.float64 if torch.float64 in (x.dtype, minus.dtype) else torch.float32
        x = x.to(dtype) - minus.to(dtype)
    bits = x.abs().float().contiguous().view(torch.int32).reshape(-1)
    keys = bits >> 16 if upper is None else (bits & 0xFFFF)[bits >> 16 == upper]
    counts += torch.bincount(keys, minlength=len(counts))

"""Histograms of magnitudes in plain torch: the specification, for any float dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(counts: Tensor, x: Tensor) -> str | None:
    return None


def add_magnitude_histogram(counts: Tensor, x: Tensor, upper: int | None) -> None:
    bits = x.abs().float().contiguous().view(torch.int32).reshape(-1)
    keys = bits >> 16 if upper is None else (bits & 0xFFFF)[bits >> 16 == upper]
    counts += torch.bincount(keys, minlength=len(counts))

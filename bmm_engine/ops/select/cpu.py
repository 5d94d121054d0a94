"""Histograms of magnitudes in C++ (csrc/cpu/select.h): each thread counts in tables of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from bmm_engine.ops import _native


def supports(counts: Tensor, x: Tensor, minus: Tensor | None = None) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, not in CPU memory"
    if not all(tensor is None or tensor.is_contiguous() for tensor in (x, minus, counts)):
        return "x, minus or counts is not contiguous"
    return _native.cpu_missing()


def add_magnitude_histogram(counts: Tensor, x: Tensor, upper: int | None, minus: Tensor | None = None) -> None:
    _native.cpu().magnitude_histogram(
        x.data_ptr(),
        x.numel(),
        _native.DTYPE_CODES[x.dtype],
        -1 if upper is None else upper,
        counts.data_ptr(),
        torch.get_num_threads(),
        *(() if minus is None else (_native.elements(minus),)),
    )

"""Histograms of magnitudes in CUDA C++ (csrc/cuda/select.cuh): one read of x, counts in shared memory."""

from __future__ import annotations

import torch
from torch import Tensor

from bmm_engine.ops import _native


def supports(counts: Tensor, x: Tensor, minus: Tensor | None = None) -> str | None:
    if reason := _native.cuda_missing():
        return reason
    if minus is not None:
        return "it counts one tensor's magnitudes, not those of a difference"
    if x.device.type != "cuda":
        return f"x is on {x.device}, not on a CUDA device"
    if not (x.is_contiguous() or (x.ndim >= 2 and x.mT.is_contiguous())):
        return f"x must be contiguous, or its transpose, and has strides {x.stride()}"
    return None


def add_magnitude_histogram(counts: Tensor, x: Tensor, upper: int | None, minus: None = None) -> None:
    _native.cuda().add_magnitude_histogram(
        x.data_ptr(),
        x.numel(),
        _native.DTYPE_CODES[x.dtype],
        counts.data_ptr(),
        -1 if upper is None else upper,
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )

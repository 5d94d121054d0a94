"""`out = s W_a + (1 - s) W_0 + B diag(shrinkage) Q^T` in CUDA C++ (csrc/cuda/spectral.cuh): one pass, into any dtype and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from bmm_engine.ops import _native


def supports(out: Tensor, anchor: Tensor, projected: Tensor, eigenvectors: Tensor, base: Tensor | None) -> str | None:
    if reason := _native.cuda_missing():
        return reason
    if out.device.type != "cuda":
        return f"out is on {out.device}, not on a CUDA device"
    if projected.shape[1] > 1 and projected.stride(1) != 1:
        return f"the rows of projected must have no gaps, and it has strides {projected.stride()}"
    if projected.shape[1] > 1 and 1 not in eigenvectors.stride():
        return (
            f"the rows or columns of the eigenvectors must have no gaps, and they have strides {eigenvectors.stride()}"
        )
    return None


def apply_spectral(
    out: Tensor,
    anchor: Tensor,
    projected: Tensor,
    shrinkage: Tensor,
    eigenvectors: Tensor,
    base: Tensor | None,
    scale: float,
    precision: str,
) -> None:
    """`precision` is ignored: float32 is multiplied as float32, float64 on the tensor cores, which is exact, too."""
    shrinkage = shrinkage.contiguous()
    _native.cuda().apply_spectral(
        _native.matrix(out),
        _native.matrix(anchor),
        _native.matrix(base),
        _native.matrix(projected),
        shrinkage.data_ptr(),
        _native.matrix(eigenvectors),
        scale,
        out.device.index,
        torch.cuda.current_stream(out.device).cuda_stream,
    )

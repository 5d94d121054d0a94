"""`A = sum_t beta_t G_t + lam I` in CUDA C++ (csrc/cuda/assemble.cuh): one pass over up to 32 Grams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.ops import _native


def supports(grams: Sequence[Tensor], out: Tensor) -> str | None:
    if reason := _native.cuda_missing():
        return reason
    if out.device.type != "cuda":
        return f"the Grams are on {out.device}, not on a CUDA device"
    if not all(tensor.is_contiguous() for tensor in (*grams, out)):
        return "a Gram or out is not contiguous"
    return None


def assemble(
    grams: Sequence[Tensor], weights: Sequence[float], ridges: Sequence[float], shrink: float, out: Tensor
) -> None:
    n = out.shape[-1]
    _native.cuda().assemble(
        [(gram.data_ptr(), _native.DTYPE_CODES[gram.dtype]) for gram in grams],
        list(weights),
        list(ridges),
        shrink,
        out.data_ptr(),
        out.numel() // max(n, 1),
        n,
        _native.DTYPE_CODES[out.dtype],
        out.device.index,
        torch.cuda.current_stream(out.device).cuda_stream,
    )

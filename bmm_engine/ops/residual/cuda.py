"""`R = sum_t beta_t (W_t - W_a) G_t` in CUDA C++ (csrc/cuda/residual.cuh): neither the differences nor T copies in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.ops import _native
from bmm_engine.ops.residual.batch import batched


def supports(anchor: Tensor, experts: Sequence[Tensor], grams: Sequence[Tensor], out: Tensor) -> str | None:
    if reason := _native.cuda_missing():
        return reason
    if anchor.device.type != "cuda":
        return f"the anchor is on {anchor.device}, not on a CUDA device"
    for tensor in (anchor, *experts, *grams, out):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"the rows of every matrix must have no gaps, and one has strides {tensor.stride()}"
        if batched(tensor) is None:
            return f"the leading dimensions of a batch of strides {tensor.stride()} are not one"
    return None


def residual(
    anchor: Tensor,
    experts: Sequence[Tensor],
    grams: Sequence[Tensor],
    weights: Sequence[float],
    out: Tensor,
    precision: str,
) -> None:
    """`precision` is ignored: float32 is multiplied as float32, float64 on the tensor cores, which is exact, too."""
    _native.cuda().residual(
        _matrices(anchor),
        [_matrices(expert) for expert in experts],
        [_matrices(gram) for gram in grams],
        list(weights),
        _matrices(out),
        out.shape[:-2].numel(),
        *out.shape[-2:],
        out.device.index,
        torch.cuda.current_stream(out.device).cuda_stream,
    )


def _matrices(tensor: Tensor) -> tuple[int, int, int, int]:
    """What the kernel needs of a batch of matrices: address, strides of members and rows, dtype."""
    batch = batched(tensor)
    assert batch is not None, "supports() has seen to it"
    return tensor.data_ptr(), batch.stride(0), batch.stride(1), _native.DTYPE_CODES[tensor.dtype]

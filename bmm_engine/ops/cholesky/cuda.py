"""Batched factorisation on a GPU: blocked.py's products by torch, the diagonal blocks in CUDA C++ (csrc/cuda/cholesky.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from bmm_engine.ops import _native
from bmm_engine.ops.cholesky import blocked

# Beyond these, one matrix keeps the device busy, and cuSOLVER's and cuBLAS's larger steps win.
MAX_WIDTH = 4096
MAX_WIDTH_ALONE = 1024


def supports(a: Tensor) -> str | None:
    """`a` is the matrix, or its factor."""
    if reason := _native.cuda_missing():
        return reason
    if a.device.type != "cuda":
        return f"the matrices are on {a.device}, not on a CUDA device"
    if not a.is_contiguous():
        return f"a row-major batch is needed, and this one has strides {a.stride()}"
    alone = a.shape[:-2].numel() == 1
    if a.shape[-1] > (limit := MAX_WIDTH_ALONE if alone else MAX_WIDTH):
        return f"{'a single matrix' if alone else 'a batch'} of width {a.shape[-1]} is left to torch, beyond {limit}"
    return None


def cholesky_(a: Tensor) -> tuple[Tensor, Tensor]:
    lower, info = blocked.cholesky_(a.view(-1, *a.shape[-2:]), _factor_diagonal)
    return lower.view(a.shape), info.view(a.shape[:-2])


def solve_right(lower: Tensor, rhs: Tensor) -> Tensor:
    """The inverses of the diagonal blocks, which the products need, are computed again: cheap beside the solve itself."""
    batch = rhs.reshape(-1, *rhs.shape[-2:])
    return blocked.solve_right(lower.view(-1, *lower.shape[-2:]), batch, _invert_diagonal).view(rhs.shape)


def _factor_diagonal(source: Tensor, target: Tensor, inverse: Tensor, info: Tensor, offset: int) -> None:
    _native.cuda().cholesky_factor(
        _squares(source), _squares(target), _squares(inverse), info.data_ptr(), offset, *_common(source)
    )


def _invert_diagonal(lower: Tensor, inverse: Tensor) -> None:
    _native.cuda().cholesky_invert(_squares(lower), _squares(inverse), *_common(lower))


def _squares(batch: Tensor) -> tuple[int, int, int]:
    """Address, strides of members and rows of (batch, width, width), whose rows have no gaps."""
    return batch.data_ptr(), batch.stride(0), batch.stride(1)


def _common(batch: Tensor) -> tuple[int, int, int, int, int]:
    return (
        batch.shape[0],
        batch.shape[-1],
        _native.DTYPE_CODES[batch.dtype],
        batch.device.index,
        torch.cuda.current_stream(batch.device).cuda_stream,
    )

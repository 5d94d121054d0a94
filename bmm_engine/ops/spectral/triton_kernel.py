"""`out = s W_a + (1 - s) W_0 + B diag(shrinkage) Q^T` in Triton: one kernel, rounded once into the live weight."""

# What a kernel takes has no type in Python.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmm_engine.ops import _triton
from bmm_engine.ops._triton_tiles import banded_tile


def supports(out: Tensor, anchor: Tensor, projected: Tensor, eigenvectors: Tensor, base: Tensor | None) -> str | None:
    if reason := _triton.unsupported_device(out.device):
        return reason
    if projected.dtype == torch.float64:
        return "there are no Triton kernels that sum in float64; torch takes them"
    return _triton.too_far(out=out, anchor=anchor, projected=projected, eigenvectors=eigenvectors, base=base)


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
    height, width = out.shape
    loaded = projected.element_size() + eigenvectors.element_size()
    tile = _triton.product_tile(height, width, loaded, precision, out.device)
    base_or_any = anchor if base is None else base
    with _triton.on(out.device):
        _spectral[(triton.cdiv(height, tile.block) * triton.cdiv(width, tile.block),)](
            out,
            *out.stride(),
            anchor,
            *anchor.stride(),
            base_or_any,
            *base_or_any.stride(),
            projected,
            *projected.stride(),
            eigenvectors,
            *eigenvectors.stride(),
            shrinkage,
            scale,
            1.0 - scale,
            height,
            width,
            WITH_BASE=base is not None,
            **tile.launch(precision),
        )


@triton.jit
def _weight(weight, row_stride, column_stride, first_i, first_j, i, j, inside):
    weight += first_i * tl.cast(row_stride, tl.int64) + first_j * tl.cast(column_stride, tl.int64)
    return tl.load(weight + (i * row_stride + j * column_stride), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _spectral(
    out,
    out_row,
    out_column,
    anchor,
    anchor_row,
    anchor_column,
    base,
    base_row,
    base_column,
    projected,
    projected_row,
    projected_column,
    eigenvectors,
    eigenvectors_row,
    eigenvectors_column,
    shrinkage,
    scale,
    rest,
    height,
    width,
    WITH_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    FLUSH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_i, first_j = banded_tile(tl.program_id(0), height, width, BLOCK)
    i, j, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    i_inside, j_inside = (i < height - first_i)[:, None], (j < width - first_j)[None, :]
    projected += first_i * tl.cast(projected_row, tl.int64)
    projected_offsets = i[:, None] * projected_row + k[None, :] * projected_column
    eigenvectors += first_j * tl.cast(eigenvectors_row, tl.int64)
    eigenvectors_offsets = k[:, None] * eigenvectors_column + j[None, :] * eigenvectors_row
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, width, FLUSH):
        part = tl.zeros((BLOCK, BLOCK), tl.float32)
        for column in range(start, tl.minimum(start + FLUSH, width), DEPTH):
            k_inside = k < width - column
            b = tl.load(projected + projected_offsets, mask=i_inside & k_inside[None, :], other=0.0)
            b = b * tl.load(shrinkage + column + k, mask=k_inside, other=0.0)[None, :]
            q = tl.load(eigenvectors + eigenvectors_offsets, mask=k_inside[:, None] & j_inside, other=0.0)
            part = tl.dot(b, q, part, input_precision=PRECISION)
            projected += tl.cast(projected_column, tl.int64) * DEPTH
            eigenvectors += tl.cast(eigenvectors_column, tl.int64) * DEPTH
        total += part
    i, j = i[:, None], j[None, :]
    inside = i_inside & j_inside
    # The tile of the anchor or base is read before that of `out` is written: they may be the same.
    total += scale * _weight(anchor, anchor_row, anchor_column, first_i, first_j, i, j, inside)
    if WITH_BASE:
        total += rest * _weight(base, base_row, base_column, first_i, first_j, i, j, inside)
    out += first_i * tl.cast(out_row, tl.int64) + first_j * tl.cast(out_column, tl.int64)
    tl.store(out + (i * out_row + j * out_column), total.to(out.dtype.element_ty), mask=inside)

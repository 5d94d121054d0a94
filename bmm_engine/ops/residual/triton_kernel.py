"""`R = sum_t beta_t (W_t - W_a) G_t` in Triton: one kernel for all experts, the differences formed in registers."""

# What a kernel takes has no type in Python.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmm_engine.ops import _triton
from bmm_engine.ops._triton_tiles import banded_tile
from bmm_engine.ops.residual.batch import batched


def supports(anchor: Tensor, experts: Sequence[Tensor], grams: Sequence[Tensor], out: Tensor) -> str | None:
    if reason := _triton.unsupported_device(out.device):
        return reason
    if out.dtype == torch.float64:
        return "there are no Triton kernels that sum in float64; torch takes them"
    for name, tensors in (("anchor", [anchor]), ("an expert", experts), ("a Gram", grams), ("out", [out])):
        for tensor in tensors:
            if batched(tensor) is None:
                return f"the leading dimensions of {name} with strides {tensor.stride()} cannot be viewed as one"
            if reason := _triton.too_far(**{name: tensor}):
                return reason
    return None


def residual(
    anchor: Tensor,
    experts: Sequence[Tensor],
    grams: Sequence[Tensor],
    weights: Sequence[float],
    out: Tensor,
    precision: str,
) -> None:
    """One launch for the experts whose tensors have one layout, which is usually all of them."""
    groups: dict[tuple[object, ...], list[tuple[Tensor, Tensor, float]]] = {}
    for expert, gram, weight in zip(experts, grams, weights, strict=True):
        layout = (expert.dtype, expert.stride(), gram.dtype, gram.stride(), _triton.aligned(expert, gram))
        groups.setdefault(layout, []).append((expert, gram, weight))
    with _triton.on(out.device):
        for number, group in enumerate(groups.values()):
            _launch(anchor, group, out, precision, add=number > 0)


def _launch(
    anchor: Tensor, group: Sequence[tuple[Tensor, Tensor, float]], out: Tensor, precision: str, add: bool
) -> None:
    first_expert, first_gram, _ = group[0]
    views: list[Any] = [batched(tensor) for tensor in (out, anchor, first_expert, first_gram)]
    R, W_a, W_t, G = views
    batch, height, width = R.shape
    loaded = W_a.element_size() + W_t.element_size() + G.element_size()
    tile = _triton.product_tile(batch * height, width, loaded, precision, out.device)
    down, across = triton.cdiv(height, tile.block), triton.cdiv(width, tile.block)
    numbers = [number for W, G_t, beta in group for number in (W.data_ptr(), G_t.data_ptr(), beta)]
    _residual[down * across, batch](
        R,
        *R.stride(),
        W_a,
        *W_a.stride(),
        *W_t.stride(),
        *G.stride(),
        _triton.table(numbers, out.device),
        len(group),
        height,
        width,
        EXPERT=_triton.element(W_t.dtype),
        GRAM=_triton.element(G.dtype),
        ALIGNMENT=16 if _triton.aligned(W_t, G) else 1,
        ADD=add,
        **tile.launch(precision),
    )


@triton.jit
def _residual(
    R,
    R_member,
    R_row,
    R_column,
    anchor,
    anchor_member,
    anchor_row,
    anchor_column,
    expert_member,
    expert_row,
    expert_column,
    gram_member,
    gram_row,
    gram_column,
    table,
    count,
    height,
    width,
    EXPERT: tl.constexpr,
    GRAM: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    FLUSH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The table's lines are (expert, Gram, weight)."""
    number, member = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_i, first_j = banded_tile(number, height, width, BLOCK)
    i, j, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    i_inside, j_inside = (i < height - first_i)[:, None], (j < width - first_j)[None, :]
    anchor += member * anchor_member + first_i * tl.cast(anchor_row, tl.int64)
    anchor_offsets = i[:, None] * anchor_row + k[None, :] * anchor_column
    expert_start = member * expert_member + first_i * tl.cast(expert_row, tl.int64)
    expert_offsets = i[:, None] * expert_row + k[None, :] * expert_column
    gram_start = member * gram_member + first_j * tl.cast(gram_column, tl.int64)
    gram_offsets = k[:, None] * gram_row + j[None, :] * gram_column
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for t in range(count):
        expert = tl.multiple_of(tl.load(table + 3 * t).to(tl.pointer_type(EXPERT)), ALIGNMENT) + expert_start
        gram = tl.multiple_of(tl.load(table + 3 * t + 1).to(tl.pointer_type(GRAM)), ALIGNMENT) + gram_start
        beta = tl.load(table + 3 * t + 2).to(tl.float64, bitcast=True).to(tl.float32)
        base = anchor
        for start in range(0, width, FLUSH):
            part = tl.zeros((BLOCK, BLOCK), tl.float32)
            for column in range(start, tl.minimum(start + FLUSH, width), DEPTH):
                k_inside = k < width - column
                inside = i_inside & k_inside[None, :]
                moved = tl.load(expert + expert_offsets, mask=inside, other=0.0).to(tl.float32)
                moved -= tl.load(base + anchor_offsets, mask=inside, other=0.0).to(tl.float32)
                g = tl.load(gram + gram_offsets, mask=k_inside[:, None] & j_inside, other=0.0).to(tl.float32)
                part = tl.dot(moved * beta, g, part, input_precision=PRECISION)
                expert += tl.cast(expert_column, tl.int64) * DEPTH
                base += tl.cast(anchor_column, tl.int64) * DEPTH
                gram += tl.cast(gram_row, tl.int64) * DEPTH
            total += part
    R += member * R_member + first_i * tl.cast(R_row, tl.int64) + first_j * tl.cast(R_column, tl.int64)
    tile = R + (i[:, None] * R_row + j[None, :] * R_column)
    if ADD:
        total += tl.load(tile, mask=i_inside & j_inside, other=0.0)
    tl.store(tile, total, mask=i_inside & j_inside)

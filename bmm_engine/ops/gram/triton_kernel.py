"""`G += X^T diag(w) X` in Triton: the tiles on and above the diagonal only, mirrored; no copy of X whatever its dtype."""

# What a kernel takes has no type in Python.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmm_engine.ops import _triton
from bmm_engine.ops._triton_rows import (
    REDUCED,
    constants,
    kind_of,
    matrices,
    product,
    rows_per_split,
    split,
    squares,
    store_partial,
    sum_partials,
    workspace,
)
from bmm_engine.ops._triton_tiles import add_mirrored, upper_tile

# The front end hands bool row weights through.
TAKES_MASKS = True

_MOST_ROWS = 2**30


def supports(G: Tensor, X: Tensor) -> str | None:
    if reason := _triton.unsupported_device(X.device):
        return reason
    if X.dtype == torch.float64:
        return "there are no Triton kernels for float64 rows; torch takes them"
    if X.numel() > _MOST_ROWS * X.shape[-1]:
        return f"more than {_MOST_ROWS} rows in one call; pass them in chunks"
    return _triton.too_far(G=G, X=X)


def accumulate_gram(G: Tensor, X: Tensor, row_weights: Tensor | None, precision: str) -> None:
    with _triton.on(X.device):
        for rows, weights in matrices(X, row_weights):
            _accumulate_one(G, rows, weights, precision)


def accumulate_grams(
    Gs: Sequence[Tensor], Xs: Sequence[Tensor], row_weights: Sequence[Tensor | None], precision: str
) -> None:
    """One launch for the modules whose tensors have one layout (and weights of one kind): usually all of them."""
    groups: dict[tuple[object, ...], list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    with _triton.on(Xs[0].device):
        for G, X, own in zip(Gs, Xs, row_weights, strict=True):
            parts = list(matrices(X, own))
            if len(parts) > 1:  # into one G, so one after the other
                for rows, weights in parts:
                    _accumulate_one(G, rows, weights, precision)
            else:
                rows, weights = parts[0]
                layout = (kind_of(weights), rows.stride(1), G.stride(), _triton.aligned(rows, G))
                groups.setdefault(layout, []).append((G, rows, weights))
        for group in groups.values():
            if len(group) == 1:
                _accumulate_one(*group[0], precision)
            else:
                _accumulate_group(group, precision)


def _accumulate_one(G: Tensor, X: Tensor, weights: Tensor | None, precision: str) -> None:
    rows, width = X.shape
    tile, launch = constants(width, X.dtype, kind_of(weights), precision)
    side = triton.cdiv(width, tile.block)
    tiles = side * (side + 1) // 2
    part, splits, into = split(rows, tiles, tile, G)
    _gram[tiles, splits](
        G, *G.stride(), X, *X.stride(), weights, into, rows, width, part, tiles, DIRECT=splits == 1, **launch
    )
    if splits > 1:
        _reduce[tiles, squares(tile)](G, *G.stride(), into, width, tiles, splits, BLOCK=tile.block, SQUARE=REDUCED)


def _accumulate_group(group: Sequence[tuple[Tensor, Tensor, Tensor | None]], precision: str) -> None:
    """Modules of one layout: see `accumulate_grams`."""
    G, X, weights = group[0]
    width, device = X.shape[1], X.device
    tile, launch = constants(width, X.dtype, kind_of(weights), precision)
    side = triton.cdiv(width, tile.block)
    tiles = side * (side + 1) // 2
    part = rows_per_split(max(rows.shape[0] for _, rows, _ in group), tiles * len(group), tile, device)
    numbers, units, most_splits = [], 0, 1
    for own_G, rows, own in group:
        splits = triton.cdiv(rows.shape[0], part)
        most_splits = max(most_splits, splits)
        pointers = (own_G.data_ptr(), rows.data_ptr(), 0 if own is None else own.data_ptr())
        numbers += [units, *pointers, rows.shape[0], rows.stride(0), splits]
        units += tiles * splits
    table = _triton.table(numbers, device)
    direct = most_splits == 1
    into = G if direct else workspace(G, units, tile)
    is_aligned = _triton.aligned(X, G)
    _gram_group[(units,)](
        table,
        len(group),
        *G.stride(),
        X.stride(1),
        into,
        width,
        part,
        tiles,
        ELEMENT=_triton.element(X.dtype),
        MODULES=triton.next_power_of_2(len(group)),
        ALIGNMENT=16 if is_aligned else 1,
        STRIDE_MULTIPLE=gcd(16, *(rows.stride(0) for _, rows, _ in group)),
        DIRECT=direct,
        **launch,
    )
    if not direct:
        _reduce_group[tiles, squares(tile), len(group)](
            table, *G.stride(), into, width, tiles, BLOCK=tile.block, SQUARE=REDUCED
        )


@triton.jit
def _gram(
    G,
    G_row,
    G_column,
    X,
    X_row,
    X_column,
    weights,
    workspace,
    rows,
    width,
    part,
    tiles,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    FLUSH: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    DIRECT: tl.constexpr,
):
    number, split = tl.program_id(0), tl.program_id(1)
    i, j = upper_tile(number)
    i, j = i * BLOCK, j * BLOCK
    first, last = split * part, tl.minimum(split * part + part, rows)
    value = product(
        X, X_row, X_column, i, width, X, X_row, X_column, j, width, weights, first, last,
        BLOCK, DEPTH, FLUSH, KIND, PRECISION, WIDEN,
    )  # fmt: skip
    if DIRECT:
        add_mirrored(G, G_row, G_column, i, j, width, value, BLOCK)
    else:
        store_partial(workspace, split * tiles + number, value, BLOCK)


@triton.jit
def _reduce(G, G_row, G_column, workspace, width, tiles, splits, BLOCK: tl.constexpr, SQUARE: tl.constexpr):
    number, square = tl.program_id(0), tl.program_id(1)
    i, j = upper_tile(number)
    own_i, own_j, value = sum_partials(workspace, number, tiles, splits, square, BLOCK, SQUARE)
    add_mirrored(G, G_row, G_column, i * BLOCK + own_i, j * BLOCK + own_j, width, value, SQUARE)


@triton.jit
def _gram_group(
    table,
    modules,
    G_row,
    G_column,
    X_column,
    workspace,
    width,
    part,
    tiles,
    ELEMENT: tl.constexpr,
    MODULES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    STRIDE_MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    FLUSH: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """The table's lines are (first unit of work, G, X, weights, rows, stride of the rows, splits)."""
    unit = tl.program_id(0)
    every = tl.arange(0, MODULES)
    begins = tl.load(table + every * 7, mask=every < modules, other=2**62)
    line = table + (tl.sum((begins <= unit).to(tl.int32), axis=0) - 1) * 7
    own = unit - tl.load(line).to(tl.int32)
    number, split = own % tiles, own // tiles
    G = tl.multiple_of(tl.load(line + 1).to(tl.pointer_type(tl.float32)), ALIGNMENT)
    X = tl.multiple_of(tl.load(line + 2).to(tl.pointer_type(ELEMENT)), ALIGNMENT)
    weights = tl.load(line + 3).to(tl.pointer_type(tl.uint8 if KIND == 1 else tl.float32))
    rows = tl.load(line + 4).to(tl.int32)
    X_row = tl.multiple_of(tl.load(line + 5), STRIDE_MULTIPLE)
    i, j = upper_tile(number)
    i, j = i * BLOCK, j * BLOCK
    first, last = split * part, tl.minimum(split * part + part, rows)
    value = product(
        X, X_row, X_column, i, width, X, X_row, X_column, j, width, weights, first, last,
        BLOCK, DEPTH, FLUSH, KIND, PRECISION, WIDEN,
    )  # fmt: skip
    if DIRECT:
        add_mirrored(G, G_row, G_column, i, j, width, value, BLOCK)
    else:
        store_partial(workspace, unit, value, BLOCK)


@triton.jit
def _reduce_group(table, G_row, G_column, workspace, width, tiles, BLOCK: tl.constexpr, SQUARE: tl.constexpr):
    number, square, line = tl.program_id(0), tl.program_id(1), table + tl.program_id(2) * 7
    i, j = upper_tile(number)
    splits = tl.load(line + 6).to(tl.int32)
    own_i, own_j, value = sum_partials(workspace, tl.load(line) + number, tiles, splits, square, BLOCK, SQUARE)
    G = tl.load(line + 1).to(tl.pointer_type(tl.float32))
    add_mirrored(G, G_row, G_column, i * BLOCK + own_i, j * BLOCK + own_j, width, value, SQUARE)

"""`C += X^T diag(w) Y` and `G += Y^T diag(w) Y` in Triton: one launch for the tiles of C and those of G on and above the
diagonal, which read the same rows of Y. Splits and their fixed order of summation are those of all products of rows."""

# What a kernel takes has no type in Python.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

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
    split,
    squares,
    store_partial,
    sum_partials,
)
from bmm_engine.ops._triton_tiles import add_mirrored, upper_tile
from bmm_engine.ops.gram.triton_kernel import supports as supports_gram

# The front end hands bool row weights through.
TAKES_MASKS = True


def supports(C: Tensor, X: Tensor, Y: Tensor, G: Tensor | None) -> str | None:
    return supports_gram(C, X) or _triton.too_far(C=C, Y=Y, G=G)


def accumulate_cross_gram(
    C: Tensor, X: Tensor, Y: Tensor, row_weights: Tensor | None, G: Tensor | None, precision: str
) -> None:
    try:
        X.view(-1, X.shape[-1]), Y.view(-1, Y.shape[-1])
    except RuntimeError:
        for index in range(X.shape[0]):
            own = None if row_weights is None else row_weights[index]
            accumulate_cross_gram(C, X[index], Y[index], own, G, precision)
        return
    ((x, weights),), ((y, _),) = matrices(X, row_weights), matrices(Y, None)
    with _triton.on(X.device):
        _accumulate(C, x, y, weights, G, precision)


def _accumulate(C: Tensor, X: Tensor, Y: Tensor, weights: Tensor | None, G: Tensor | None, precision: str) -> None:
    rows, x_width, y_width = X.shape[0], X.shape[1], Y.shape[1]
    tile, launch = constants(max(x_width, y_width), X.dtype, kind_of(weights), precision)
    down, across = triton.cdiv(x_width, tile.block), triton.cdiv(y_width, tile.block)
    cross_tiles = down * across
    tiles = cross_tiles + (0 if G is None else across * (across + 1) // 2)
    part, splits, workspace = split(rows, tiles, tile, C)
    into = (C, *C.stride(), *((C, 0, 0) if G is None else (G, *G.stride())))
    shape = (x_width, y_width, down, cross_tiles, tiles)
    _cross_gram[tiles, splits](
        *into, X, *X.stride(), Y, *Y.stride(), weights, workspace, *shape, rows, part, DIRECT=splits == 1, **launch
    )
    if splits > 1:
        _reduce[tiles, squares(tile)](*into, workspace, *shape, splits, BLOCK=tile.block, SQUARE=REDUCED)


@triton.jit
def _add(C, C_row, C_column, first_i, first_j, x_width, y_width, value, SIDE: tl.constexpr):
    i, j = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    tile = C + (first_i * tl.cast(C_row, tl.int64) + first_j * tl.cast(C_column, tl.int64))
    tile += i * C_row + j * C_column
    inside = (i < x_width - first_i) & (j < y_width - first_j)
    tl.store(tile, tl.load(tile, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def _cross_gram(
    C,
    C_row,
    C_column,
    G,
    G_row,
    G_column,
    X,
    X_row,
    X_column,
    Y,
    Y_row,
    Y_column,
    weights,
    workspace,
    x_width,
    y_width,
    down,
    cross_tiles,
    tiles,
    rows,
    part,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    FLUSH: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    DIRECT: tl.constexpr,
):
    number, split = tl.program_id(0), tl.program_id(1)
    first, last = split * part, tl.minimum(split * part + part, rows)
    # Tiles of C down its columns, then those of G; the left factor is X or Y.
    of_cross = number < cross_tiles
    i, j = upper_tile(tl.maximum(number - cross_tiles, 0))
    i, j = tl.where(of_cross, number % down, i) * BLOCK, tl.where(of_cross, number // down, j) * BLOCK
    left = X
    if not of_cross:
        left = Y
    left_row, left_column = tl.where(of_cross, X_row, Y_row), tl.where(of_cross, X_column, Y_column)
    left_width = tl.where(of_cross, x_width, y_width)
    value = product(
        left, left_row, left_column, i, left_width, Y, Y_row, Y_column, j, y_width, weights, first, last,
        BLOCK, DEPTH, FLUSH, KIND, PRECISION, WIDEN,
    )  # fmt: skip
    if DIRECT:
        if of_cross:
            _add(C, C_row, C_column, i, j, x_width, y_width, value, BLOCK)
        else:
            add_mirrored(G, G_row, G_column, i, j, y_width, value, BLOCK)
    else:
        store_partial(workspace, split * tiles + number, value, BLOCK)


@triton.jit
def _reduce(
    C,
    C_row,
    C_column,
    G,
    G_row,
    G_column,
    workspace,
    x_width,
    y_width,
    down,
    cross_tiles,
    tiles,
    splits,
    BLOCK: tl.constexpr,
    SQUARE: tl.constexpr,
):
    number, square = tl.program_id(0), tl.program_id(1)
    own_i, own_j, value = sum_partials(workspace, number, tiles, splits, square, BLOCK, SQUARE)
    if number < cross_tiles:
        i, j = number % down * BLOCK + own_i, number // down * BLOCK + own_j
        _add(C, C_row, C_column, i, j, x_width, y_width, value, SQUARE)
    else:
        i, j = upper_tile(number - cross_tiles)
        add_mirrored(G, G_row, G_column, i * BLOCK + own_i, j * BLOCK + own_j, y_width, value, SQUARE)

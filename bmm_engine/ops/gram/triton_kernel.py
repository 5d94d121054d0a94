"""`G += X^T diag(w) X` in Triton: the tiles on and above the diagonal only, mirrored; no copy of X whatever its dtype.

A tile's rows are split over several programs where the tiles alone would not fill the device. The splits' partial tiles
go to a workspace and are added up in a fixed order by a second kernel, so the bits do not depend on scheduling.
"""

# What a kernel takes has no type in Python.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmm_engine.ops import _triton

# The front end hands bool row weights through.
TAKES_MASKS = True

# How rows are weighted, as a constant of the kernels.
PLAIN, MASKED, WEIGHTED = 0, 1, 2

# Partial tiles are added up in squares of this side.
REDUCED = 32

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


def matrices(X: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """X (..., in) as 2-D views with their weights, contiguous: one where the strides allow it, else one per index."""
    try:
        rows = X.view(-1, X.shape[-1])
    except RuntimeError:
        for index in range(X.shape[0]):
            yield from matrices(X[index], None if weights is None else weights[index])
    else:
        if weights is not None:
            weights = weights.reshape(-1).contiguous()
            weights = weights.view(torch.uint8) if weights.dtype == torch.bool else weights
        yield rows, weights


def kind_of(weights: Tensor | None) -> int:
    if weights is None:
        return PLAIN
    return MASKED if weights.dtype == torch.uint8 else WEIGHTED


def constants(width: int, dtype: torch.dtype, kind: int, precision: str) -> tuple[_triton.Tile, dict[str, object]]:
    """How products of rows are cut, and the kernels' constants for it.

    Chosen by arithmetic and the compiler's report (registers, shared memory) for compute capability 9.0; not tuned on
    hardware.
    """
    wide = width > 64
    sixteen_bit = dtype.itemsize == 2
    if sixteen_bit and kind == WEIGHTED:
        # The weighted row is rounded to float32 as in plain torch; the other factor is a 16-bit number, which TF32
        # holds exactly: three TF32 products then lose nothing that float32 would keep.
        precision = "tf32x3"
    if _triton.interpreted():
        tile = _triton.INTERPRETED_TILE
    elif sixteen_bit and kind != WEIGHTED:
        tile = _triton.Tile(128, 64, 512, 8, 3) if wide else _triton.Tile(64, 64, 512, 4, 4)
    elif precision == "ieee":
        tile = _triton.Tile(128, 16, 512, 8, 3) if wide else _triton.Tile(64, 16, 512, 4, 3)
    else:
        tile = _triton.Tile(128, 32, 256, 8, 3) if wide else _triton.Tile(64, 32, 256, 4, 3)
    return tile, {
        "BLOCK": tile.block,
        "DEPTH": tile.depth,
        "FLUSH": tile.flush,
        "KIND": kind,
        "PRECISION": "ieee" if sixteen_bit and kind != WEIGHTED else precision,
        # The interpreter multiplies the bit patterns of bfloat16.
        "WIDEN": sixteen_bit and (kind == WEIGHTED or _triton.interpreted()),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def rows_per_split(rows: int, tiles: int, tile: _triton.Tile, device: torch.device) -> int:
    """How many rows one program sums: all of them, or so many that the programs fill the device evenly."""
    # By their registers, one wide tile or four narrow ones live on a processor at a time.
    return _rows_per_split(rows, tiles, tile, _triton.processors(device) * (1 if tile.block > 64 else 4))


@lru_cache(maxsize=1024)
def _rows_per_split(rows: int, tiles: int, tile: _triton.Tile, at_once: int) -> int:
    best, least = rows, float("inf")
    for splits in range(1, max(1, min(rows // tile.flush, 2 * at_once // tiles + 1)) + 1):
        # In rows: waves of programs, each of which has its share, and its partial tile to write and have read again.
        share = triton.cdiv(rows, splits)
        cost = triton.cdiv(tiles * splits, at_once) * (share + (tile.flush // 2 if splits > 1 else 0))
        if cost < least:
            best, least = share, cost
    return triton.cdiv(best, tile.depth) * tile.depth


def _accumulate_one(G: Tensor, X: Tensor, weights: Tensor | None, precision: str) -> None:
    rows, width = X.shape
    tile, launch = constants(width, X.dtype, kind_of(weights), precision)
    side = triton.cdiv(width, tile.block)
    tiles = side * (side + 1) // 2
    part = rows_per_split(rows, tiles, tile, X.device)
    splits = triton.cdiv(rows, part)
    workspace = G if splits == 1 else G.new_empty(splits * tiles * tile.block**2)
    _gram[tiles, splits](
        G, *G.stride(), X, *X.stride(), weights, workspace, rows, width, part, tiles, DIRECT=splits == 1, **launch
    )
    if splits > 1:
        squares = (tile.block // REDUCED) ** 2
        _reduce[tiles, squares](G, *G.stride(), workspace, width, tiles, splits, BLOCK=tile.block, SQUARE=REDUCED)


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
    workspace = G if direct else G.new_empty(units * tile.block**2)
    is_aligned = _triton.aligned(X, G)
    _gram_group[(units,)](
        table,
        len(group),
        *G.stride(),
        X.stride(1),
        workspace,
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
        squares = (tile.block // REDUCED) ** 2
        _reduce_group[tiles, squares, len(group)](
            table, *G.stride(), workspace, width, tiles, BLOCK=tile.block, SQUARE=REDUCED
        )


@triton.jit
def product(
    left,
    left_row,
    left_column,
    left_first,
    left_columns,
    right,
    right_row,
    right_column,
    right_first,
    right_columns,
    weights,
    first,
    last,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    FLUSH: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The BLOCK x BLOCK tile at (left_first, right_first) of the sum over rows `first <= k < last` of
    `left[k, :]^T w[k] right[k, :]`, in float32."""
    own, k = tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    # Where a tile begins in 64 bits, offsets within it in 32, which cost half the registers: see `_triton.too_far`.
    left_row64, right_row64 = tl.cast(left_row, tl.int64), tl.cast(right_row, tl.int64)
    left += first * left_row64 + left_first * tl.cast(left_column, tl.int64)
    right += first * right_row64 + right_first * tl.cast(right_column, tl.int64)
    left_offsets = k[:, None] * left_row + own[None, :] * left_column
    right_offsets = k[:, None] * right_row + own[None, :] * right_column
    left_inside, right_inside = (own < left_columns - left_first)[None, :], (own < right_columns - right_first)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(first, last, FLUSH):
        part = tl.zeros((BLOCK, BLOCK), tl.float32)
        for row in range(start, tl.minimum(start + FLUSH, last), DEPTH):
            used = row + k < last
            if KIND != 0:
                w = tl.load(weights + row + k, mask=used, other=0)
                used = used & (w != 0)  # a row of weight 0 is not even read, so it may hold NaN
            a = tl.load(left + left_offsets, mask=used[:, None] & left_inside, other=0.0)
            b = tl.load(right + right_offsets, mask=used[:, None] & right_inside, other=0.0)
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            if KIND == 2:
                a = a * w[:, None]
            part = tl.dot(tl.trans(a), b, part, input_precision=PRECISION)
            left += left_row64 * DEPTH
            right += right_row64 * DEPTH
        total += part
    return total


@triton.jit
def upper_tile(number):
    """(i, j), i <= j, of a tile on or above the diagonal, numbered down the columns."""
    j = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: one off at most.
    j = tl.where(j * (j + 1) // 2 > number, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= number, j + 1, j)
    return number - j * (j + 1) // 2, j


@triton.jit
def add_mirrored(G, G_row, G_column, first_i, first_j, width, value, SIDE: tl.constexpr):
    """Adds the tile at (first_i, first_j) to G where `i <= j`, and writes the sums to `G[j, i]` too. Nothing below the
    diagonal is read."""
    row64, column64 = tl.cast(G_row, tl.int64), tl.cast(G_column, tl.int64)
    i, j = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    tile = G + (first_i * row64 + first_j * column64) + (i * G_row + j * G_column)
    upper = (first_i + i <= first_j + j) & (j < width - first_j)
    value += tl.load(tile, mask=upper, other=0.0)
    tl.store(tile, value, mask=upper)
    i, j = tl.arange(0, SIDE)[None, :], tl.arange(0, SIDE)[:, None]
    tile = G + (first_j * row64 + first_i * column64) + (j * G_row + i * G_column)
    tl.store(tile, tl.trans(value), mask=(first_i + i < first_j + j) & (j < width - first_j))


@triton.jit
def store_partial(workspace, number, value, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(workspace + tl.cast(number, tl.int64) * (BLOCK * BLOCK) + i * BLOCK + j, value)


@triton.jit
def sum_partials(workspace, first, step, splits, i, j, BLOCK: tl.constexpr, SQUARE: tl.constexpr):
    """The sum of `splits` partial tiles, numbers `first`, `first + step` ..., in that order: their square at (i, j)."""
    part = workspace + tl.cast(first, tl.int64) * (BLOCK * BLOCK) + i * BLOCK + j
    offsets = tl.arange(0, SQUARE)[:, None] * BLOCK + tl.arange(0, SQUARE)[None, :]
    total = tl.zeros((SQUARE, SQUARE), tl.float32)
    for _ in range(splits):
        total += tl.load(part + offsets)
        part += tl.cast(step, tl.int64) * (BLOCK * BLOCK)
    return total


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
    own_i, own_j = square // (BLOCK // SQUARE) * SQUARE, square % (BLOCK // SQUARE) * SQUARE
    value = sum_partials(workspace, number, tiles, splits, own_i, own_j, BLOCK, SQUARE)
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
    own_i, own_j = square // (BLOCK // SQUARE) * SQUARE, square % (BLOCK // SQUARE) * SQUARE
    splits = tl.load(line + 6).to(tl.int32)
    value = sum_partials(workspace, tl.load(line) + number, tiles, splits, own_i, own_j, BLOCK, SQUARE)
    G = tl.load(line + 1).to(tl.pointer_type(tl.float32))
    add_mirrored(G, G_row, G_column, i * BLOCK + own_i, j * BLOCK + own_j, width, value, SQUARE)

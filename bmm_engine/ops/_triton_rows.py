"""Products of rows in Triton, `sum_k left[k, :]^T w[k] right[k, :]`: tile by tile, in float32.

A tile's rows are split over several programs where the tiles alone would not fill the device. The splits' partial tiles
go to a workspace and are added up in a fixed order by a second kernel, so the bits do not depend on scheduling.
"""

# What a kernel takes has no type in Python.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmm_engine.ops import _triton

# How rows are weighted, as a constant of the kernels.
PLAIN, MASKED, WEIGHTED = 0, 1, 2

# Partial tiles are added up in squares of this side.
REDUCED = 32


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
        **tile.launch("ieee" if sixteen_bit and kind != WEIGHTED else precision),
        "KIND": kind,
        # The interpreter multiplies the bit patterns of bfloat16.
        "WIDEN": sixteen_bit and (kind == WEIGHTED or _triton.interpreted()),
    }


def split(rows: int, tiles: int, tile: _triton.Tile, total: Tensor) -> tuple[int, int, Tensor]:
    """How many rows a program sums, over how many programs a tile's rows are split, and where these write: `total`
    itself where there is one, else a workspace for their partial tiles."""
    part = rows_per_split(rows, tiles, tile, total.device)
    splits = triton.cdiv(rows, part)
    return part, splits, total if splits == 1 else workspace(total, splits * tiles, tile)


def workspace(total: Tensor, count: int, tile: _triton.Tile) -> Tensor:
    """Room for so many partial tiles, in the dtype of `total`."""
    return total.new_empty(count * tile.block**2)


def squares(tile: _triton.Tile) -> int:
    """Of a tile: programs that add up its partial tiles."""
    return (tile.block // REDUCED) ** 2


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
def store_partial(workspace, number, value, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(workspace + tl.cast(number, tl.int64) * (BLOCK * BLOCK) + i * BLOCK + j, value)


@triton.jit
def sum_partials(workspace, first, step, splits, square, BLOCK: tl.constexpr, SQUARE: tl.constexpr):
    """The sum of `splits` partial tiles, numbers `first`, `first + step` ..., in that order: where their `square` begins
    within the tile, and its values."""
    i, j = square // (BLOCK // SQUARE) * SQUARE, square % (BLOCK // SQUARE) * SQUARE
    part = workspace + tl.cast(first, tl.int64) * (BLOCK * BLOCK) + i * BLOCK + j
    offsets = tl.arange(0, SQUARE)[:, None] * BLOCK + tl.arange(0, SQUARE)[None, :]
    total = tl.zeros((SQUARE, SQUARE), tl.float32)
    for _ in range(splits):
        total += tl.load(part + offsets)
        part += tl.cast(step, tl.int64) * (BLOCK * BLOCK)
    return i, j, total

"""Tiles of a matrix in Triton: which one a program computes, and how a symmetric matrix takes one."""

# What a kernel takes has no type in Python.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def banded_tile(number, height, width, BLOCK: tl.constexpr):
    """The first row and column of a tile of a height x width matrix. Tiles are numbered in bands of 8 in height, down the
    columns of a band: programs that run at once then share their columns of the right factor in L2."""
    down, across = tl.cdiv(height, BLOCK), tl.cdiv(width, BLOCK)
    band = number // (8 * across) * 8
    tall = tl.minimum(down - band, 8)
    return (band + number % (8 * across) % tall) * BLOCK, number % (8 * across) // tall * BLOCK


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

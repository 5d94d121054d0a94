"""`A = sum_t beta_t G_t + lam I`, off-diagonal entries shrunk, in Triton: one pass over any number of Grams."""

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

# Elements that one program adds up: 16 bytes per thread and Gram at 4 warps. Not tuned on hardware.
_ELEMENTS = 1024
_ELEMENTS_INTERPRETED = 2048


def supports(grams: Sequence[Tensor], out: Tensor) -> str | None:
    if reason := _triton.unsupported_device(out.device):
        return reason
    if not all(tensor.is_contiguous() for tensor in (*grams, out)):
        return "a Gram or out is not contiguous"
    return None


def assemble(
    grams: Sequence[Tensor], weights: Sequence[float], ridges: Sequence[float], shrink: float, out: Tensor
) -> None:
    n = out.shape[-1]
    lines = out.numel() // n  # of all members
    elements = _ELEMENTS_INTERPRETED if _triton.interpreted() else _ELEMENTS
    columns = min(triton.next_power_of_2(n), elements)
    rows = elements // columns
    # Each dtype's Grams follow one another: a kernel reads a pointer as one type.
    order = sorted(range(len(grams)), key=lambda t: grams[t].dtype == torch.float64)
    narrow = sum(gram.dtype == torch.float32 for gram in grams)
    pairs = [number for t in order for number in (grams[t].data_ptr(), float(weights[t]))]
    table = _triton.table([*pairs, shrink, *ridges], out.device)
    with _triton.on(out.device):
        _assemble[triton.cdiv(lines, rows), triton.cdiv(n, columns)](
            out,
            table,
            narrow,
            len(grams),
            lines,
            n,
            ONE_RIDGE=len(ridges) == 1,
            ALIGNMENT=16 if _triton.aligned(*grams) else gcd(8, *(gram.itemsize for gram in grams)),
            ROWS=rows,
            COLUMNS=columns,
        )


@triton.jit
def _double(address):
    """A float64 kept by its bits among the table's int64."""
    return tl.load(address).to(tl.float64, bitcast=True)


@triton.jit
def _assemble(
    out,
    table,
    narrow,
    count,
    lines,
    n,
    ONE_RIDGE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The table holds (Gram, weight) for each Gram, the `narrow` in float32 first, then shrink, then the ridges. Rows of
    all members are numbered through."""
    dtype = out.dtype.element_ty
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (line < lines)[:, None] & (column < n)[None, :]
    offsets = line[:, None] * n + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype)
    for t in range(narrow):
        gram = tl.multiple_of(tl.load(table + 2 * t).to(tl.pointer_type(tl.float32)), ALIGNMENT)
        weight = _double(table + 2 * t + 1).to(dtype)
        total += weight * tl.load(gram + offsets, mask=inside, other=0.0).to(dtype)
    for t in range(narrow, count):
        gram = tl.multiple_of(tl.load(table + 2 * t).to(tl.pointer_type(tl.float64)), ALIGNMENT)
        weight = _double(table + 2 * t + 1).to(dtype)
        total += weight * tl.load(gram + offsets, mask=inside, other=0.0).to(dtype)
    shrink = _double(table + 2 * count).to(dtype)
    ridges = table + 2 * count + 1
    if ONE_RIDGE:
        ridge = _double(ridges).to(dtype)
        with_ridge = total + ridge
    else:
        ridge = tl.load(ridges + line // n, mask=line < lines, other=0).to(tl.float64, bitcast=True).to(dtype)
        with_ridge = total + ridge[:, None]
    on_diagonal = (line % n)[:, None] == column[None, :]
    tl.store(out + offsets, tl.where(on_diagonal, with_ridge, total * shrink), mask=inside)

"""A batch of Cholesky factorisations out of matrix products: what is none, the diagonal blocks, is done by a function given.

Each block of columns, `BLOCK` wide, takes from the factor left of it what belongs to it (one product), has its diagonal block factored and
inverted (all members of the batch at once), and multiplies the rows below by that inverse. Products with the factor far to the left are made
for `PANEL` columns at a time, so that they read it less often. Multiplying by the inverse of a diagonal block rounds about as well as
substitution does: tests/ops/test_cholesky.py holds the backward error to the bound that substitution meets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bmm_engine.ops import _dispatch

BLOCK = 64
PANEL = 256

# factor(source, target, inverse, info, offset), all (batch, width, width) with width <= BLOCK, and info int32 (batch,): of each member whose
# info is 0, writes L of `source = L L^T` into the lower triangle of `target`, and L^{-1}, zeros above its diagonal, into `inverse`; or, if
# minor m is the first that is not positive definite, offset + m into info.
FactorDiagonal = Callable[[Tensor, Tensor, Tensor, Tensor, int], None]
# invert(lower, inverse), both (batch, width, width): inverts the diagonal blocks of `lower`, BLOCK wide, into the same places of `inverse`,
# which is zero elsewhere.
InvertDiagonal = Callable[[Tensor, Tensor], None]


def cholesky_(a: Tensor, factor_diagonal: FactorDiagonal) -> tuple[Tensor, Tensor]:
    """`a` (batch, n, n), contiguous: L in its memory, zeros above the diagonal; and info, int32 (batch,)."""
    batch, n, _ = a.shape
    info = a.new_zeros(batch, dtype=torch.int32)
    inverse = a.new_empty(batch, BLOCK, BLOCK)
    columns = a.new_empty(batch, n, BLOCK)
    with _dispatch.exact_matmul():
        for first in range(0, n, PANEL):
            last = min(first + PANEL, n)
            if first:
                a[:, first:, first:last].baddbmm_(a[:, first:, :first], a[:, first:last, :first].mT, alpha=-1)
            for start in range(first, last, BLOCK):
                end = min(start + BLOCK, last)
                width = end - start
                work = columns[:, start:, :width]
                if start == first:
                    work.copy_(a[:, start:, start:end])
                else:
                    left = a[:, start:, first:start]
                    torch.baddbmm(a[:, start:, start:end], left, left[:, :width].mT, alpha=-1, out=work)
                diagonal = inverse[:, :width, :width]
                factor_diagonal(work[:, :width], a[:, start:end, start:end], diagonal, info, start)
                if end < n:
                    torch.bmm(work[:, width:], diagonal.mT, out=a[:, end:, start:end])
    return a.tril_(), info


def solve_right(lower: Tensor, rhs: Tensor, invert_diagonal: InvertDiagonal) -> Tensor:
    """`rhs A^{-1}` for `rhs` (batch, rows, n), `A = L L^T`, `lower` (batch, n, n)."""
    batch, n, _ = lower.shape
    panel = BLOCK
    while panel < min(n, PANEL):
        panel *= 2
    out = torch.empty_like(rhs, memory_format=torch.contiguous_format)
    scratch = rhs.new_empty(batch, rhs.shape[1], panel)
    with _dispatch.exact_matmul():
        inverses = _inverse_panels(lower, invert_diagonal, panel)
        panels = [(start, min(start + panel, n)) for start in range(0, n, panel)]
        for index, (start, end) in enumerate(panels):  # X L^T = rhs, from left to right
            inverse = inverses[:, index, : end - start, : end - start]
            work = rhs[:, :, start:end]
            if start:
                work = torch.baddbmm(
                    work, out[:, :, :start], lower[:, start:end, :start].mT, alpha=-1, out=scratch[:, :, : end - start]
                )
            torch.bmm(work, inverse.mT, out=out[:, :, start:end])
        for index, (start, end) in reversed(list(enumerate(panels))):  # Y L = X, from right to left, in place of X
            inverse = inverses[:, index, : end - start, : end - start]
            work = scratch[:, :, : end - start]
            if end < n:
                torch.baddbmm(out[:, :, start:end], out[:, :, end:], lower[:, end:, start:end], alpha=-1, out=work)
            else:
                work.copy_(out[:, :, start:end])
            torch.bmm(work, inverse, out=out[:, :, start:end])
    return out


def _inverse_panels(lower: Tensor, invert_diagonal: InvertDiagonal, panel: int) -> Tensor:
    """The inverses (batch, panels, panel, panel) of L's diagonal blocks, `panel` wide; the last may be narrower, in its upper left corner."""
    batch, n, _ = lower.shape
    whole, rest = divmod(n, panel)
    count = whole + (rest > 0)
    # One row more than a block has: then blocks on the diagonals of all panels lie at one stride, and are one batch of a product.
    blocks = lower.new_zeros(batch, count, panel + 1, panel)
    if whole:
        square = lower[:, : whole * panel, : whole * panel].unflatten(2, (whole, panel)).unflatten(1, (whole, panel))
        blocks[:, :whole, :panel] = square.diagonal(dim1=1, dim2=3).movedim(-1, 1)
    if rest:
        blocks[:, whole, :rest, :rest] = lower[:, whole * panel :, whole * panel :]
        blocks[:, whole, :panel].diagonal(dim1=-2, dim2=-1)[:, rest:] = 1  # an identity, to make it whole
    inverses = torch.zeros_like(blocks)
    invert_diagonal(blocks.flatten(0, 1)[:, :panel], inverses.flatten(0, 1)[:, :panel])
    size = BLOCK
    while size < panel:
        # [L11 0; L21 L22]^-1 = [I11 0; -I22 L21 I11, I22], all pairs at once
        shape, stride = (batch * count * (panel // (2 * size)), size, size), (2 * size * (panel + 1), panel, 1)
        first, second = inverses.as_strided(shape, stride), inverses.as_strided(shape, stride, size * (panel + 1))
        product = torch.bmm(second, blocks.as_strided(shape, stride, size * panel))
        inverses.as_strided(shape, stride, size * panel).baddbmm_(product, first, beta=0, alpha=-1)
        size *= 2
    return inverses[:, :, :panel]

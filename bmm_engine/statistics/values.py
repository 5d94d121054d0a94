"""Can these numbers have been measured? What every second moment and every Fisher information must satisfy, checked where one is read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bmm_engine.errors import CheckpointError, NonFiniteGramError

# Relative to what Cauchy and Schwarz allow, for rounding: sums of many rows, in chunks.
_SLACK = {torch.float32: 1e-3, torch.float64: 1e-9}
_ASYMMETRY = {torch.float32: 1e-5, torch.float64: 1e-12}
# Below zero, relative to the trace, by which an eigenvalue may lie; and up to which width a factorisation tells (its cost is that of the solve).
_INDEFINITE = {torch.float32: 1e-4, torch.float64: 1e-9}
_FACTORED_WIDTH = 256
# The square of a number below 1e-19 is zero in float32 where its product with another is not: what so many rows of such may lack on the diagonal.
_LOST = {dtype: 2.0**24 * torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}
# Entries that are looked at at a time.
_SLAB = 4 * 2**20
_REMEDY = (
    "A file of it is damaged or was edited, or a weight of the model is not sound: collect it again from a good one."
)


def check_gram(total: Tensor, row_sum: Tensor, rows: int, where: str, name: str) -> None:
    """Raise unless `total` (in, in) can be `sum x x^T`, and `row_sum` (in,) `sum x`, of so many rows x of which one is not zero.

    Raises `NonFiniteGramError`, `CheckpointError`.
    """
    what = f"the Gram of {name!r}"
    check_second_moment(total, where, what, name)
    _check_finite(row_sum, where, f"the sum of the rows of {name!r}", name)
    diagonal = total.diagonal().double()
    if not bool(diagonal.any()):
        raise CheckpointError(
            f"{where}: {what} is all zero, though {rows} rows were measured: nothing can be solved on it. Collect it again on data that reaches the"
            " module, leave the module out with `modules`, or, where the model itself gives it zeros, leave `mode: plain` out."
        )
    # (sum x_i)^2 <= n sum x_i^2: so many rows at least.
    needed = row_sum.double().square() / (diagonal + _LOST[total.dtype])
    if bool((needed > rows * (1 + 10 * _SLACK[total.dtype])).any()):
        raise CheckpointError(
            f"{where}: {what} says that {rows} rows were measured, its sums are of {float(needed.max()):.6g} at least. {_REMEDY}"
        )


def check_second_moment(total: Tensor, where: str, what: str, name: str) -> None:
    """Raise unless `total` (n, n) can be a sum of `x x^T`: finite, symmetric, no entry larger than its two on the diagonal allow; up to a width
    of 256 positive semi-definite, to rounding. Raises `NonFiniteGramError`, `CheckpointError`."""
    _check_finite(total, where, what, name)
    diagonal = total.diagonal()
    if bool((diagonal < 0).any()):
        index = int(diagonal.argmin())
        raise CheckpointError(
            f"{where}: {what} is no second moment: entry ({index}, {index}) is {float(diagonal[index]):.6g}, a sum of squares is not negative."
            f" {_REMEDY}"
        )
    root = (diagonal + _LOST[total.dtype]).sqrt()
    for rows in _slabs(len(root)):
        part, allowed = total[rows], root[rows, None] * root
        if bool(((part - total[:, rows].mT).abs() > _ASYMMETRY[total.dtype] * allowed).any()):
            i, j = _worst((part - total[:, rows].mT).abs(), rows)
            raise CheckpointError(
                f"{where}: {what} is not symmetric: entry ({i}, {j}) is {float(total[i, j]):.6g}, entry ({j}, {i}) {float(total[j, i]):.6g}."
                f" {_REMEDY}"
            )
        if bool((part.abs() > (1 + _SLACK[total.dtype]) * allowed).any()):
            i, j = _worst(part.abs() - allowed, rows)
            raise CheckpointError(
                f"{where}: {what} is no second moment: entry ({i}, {j}) is {float(total[i, j]):.6g}, its diagonal allows"
                f" {float(root[i] * root[j]):.6g}. {_REMEDY}"
            )
    if len(root) <= _FACTORED_WIDTH and bool(diagonal.any()):
        wide = total.double()
        scale = float(wide.diagonal().sum())
        shifted = wide / scale + _INDEFINITE[total.dtype] * torch.eye(len(root), dtype=wide.dtype, device=wide.device)
        if int(torch.linalg.cholesky_ex(shifted).info):
            lowest = float(torch.linalg.eigvalsh(wide)[0])
            raise CheckpointError(
                f"{where}: {what} is no second moment: it has the eigenvalue {lowest:.6g}, which must not be negative. {_REMEDY}"
            )


def check_not_negative(values: Tensor, where: str, what: str) -> None:
    """Raise `CheckpointError` unless all are finite and none is below zero, as means of squares are."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise CheckpointError(f"{where}: {what} holds {bad} entries that are NaN or infinite. {_REMEDY}")
    if values.numel() and bool((values < 0).any()):
        raise CheckpointError(
            f"{where}: {what} holds {int((values < 0).sum())} negative entries, the lowest {float(values.min()):.6g}; it is a mean of squares."
            f" {_REMEDY}"
        )


def _check_finite(values: Tensor, where: str, what: str, name: str) -> None:
    if bool(torch.isfinite(values.sum(dtype=torch.float64))):
        return
    count = int((~torch.isfinite(values)).sum())
    if count:
        raise NonFiniteGramError(
            f"{where}: {what} holds {count} entries that are NaN or infinite. Collect it again from its expert.",
            module=name,
            count=count,
        )


def _slabs(width: int) -> Iterator[slice]:
    step = max(1, _SLAB // width)
    return (slice(start, min(start + step, width)) for start in range(0, width, step))


def _worst(excess: Tensor, rows: slice) -> tuple[int, int]:
    """Where in the whole matrix the largest entry of its `rows` stands."""
    i, j = divmod(int(excess.argmax()), excess.shape[1])
    return rows.start + i, j

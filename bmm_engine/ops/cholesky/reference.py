"""Plain torch, any dtype that it factors (float32, float64)."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky_(a: Tensor) -> tuple[Tensor, Tensor]:
    """`A = L L^T` for each member of `a` (batch, n, n), symmetric and contiguous, in the memory of `a`, which is overwritten.

    Returns `(lower, info)`: L (batch, n, n), a view of `a`; and int32 (batch,): 0, or the order of the first leading minor that is not positive
    definite (that member's L is then undefined). Nothing is raised: what to do about a member that fails is the caller's policy.
    """
    info = torch.empty(a.shape[:-2], dtype=torch.int32, device=a.device)
    # LAPACK wants columns contiguous; a symmetric matrix read that way is its own transpose, so nothing is copied.
    lower, info = torch.linalg.cholesky_ex(a.mT, out=(a.mT, info))
    return lower, info


def solve_right(lower: Tensor, rhs: Tensor) -> Tensor:
    """`rhs A^{-1}` for `rhs` (..., rows, n), with `A = L L^T` given by `lower` (..., n, n)."""
    half = torch.linalg.solve_triangular(lower.mT, rhs, upper=True, left=False)  # rhs L^{-T}
    return torch.linalg.solve_triangular(lower, half, upper=False, left=False)

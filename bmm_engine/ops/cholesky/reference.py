"""Plain torch (LAPACK, cuSOLVER, cuBLAS): the specification, for any device."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(a: Tensor) -> str | None:
    return None


def cholesky_(a: Tensor) -> tuple[Tensor, Tensor]:
    info = torch.empty(a.shape[:-2], dtype=torch.int32, device=a.device)
    # LAPACK wants columns contiguous; a symmetric matrix read that way is its own transpose, so nothing is copied.
    lower, info = torch.linalg.cholesky_ex(a.mT, out=(a.mT, info))
    return lower, info


def solve_right(lower: Tensor, rhs: Tensor) -> Tensor:
    half = torch.linalg.solve_triangular(lower.mT, rhs, upper=True, left=False)  # rhs L^{-T}
    return torch.linalg.solve_triangular(lower, half, upper=False, left=False)

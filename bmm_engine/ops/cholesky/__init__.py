"""Cholesky factors of a batch of symmetric matrices, and solves with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.ops import _dispatch
from bmm_engine.ops._checks import SUMMED, check_dtype, check_square
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.ops.cholesky import cuda, reference

__all__ = ["IMPLEMENTATIONS", "cholesky_", "solve_right"]

# On the CPU torch calls LAPACK; on a GPU it factors one matrix of a batch after the other, or slowly.
IMPLEMENTATIONS = {"torch": reference, "cuda": cuda}


@accepts_dlpack
def cholesky_(a: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`A = L L^T` for each member of a batch, in the memory of `a`, which is overwritten.

    Args:
        a: (..., in, in), float32 or float64, contiguous; each member symmetric.
        backend: "auto", "torch" or "cuda".

    Returns:
        lower: L (..., in, in), zeros above the diagonal: a view of `a`, row-major ("cuda") or column-major ("torch").
        info: int32 (...): 0, or the order of the first leading minor that is not positive definite (that member's L is
            undefined then). Nothing is raised: what to do about a member that fails is the caller's policy.

    Raises:
        ShapeMismatchError: a is not square.
        ConfigError: a dtype that does not fit, a is not contiguous, an unknown backend.
        BackendError: the backend asked for cannot run this call.
    """
    check_square("a", a)
    check_dtype("a", a.dtype, SUMMED)
    if not a.is_contiguous():
        raise ConfigError(f"a must be contiguous, since it is factored in place, and has strides {a.stride()}")
    implementation = _select(a, backend)
    if not a.numel():
        return a, torch.zeros(a.shape[:-2], dtype=torch.int32, device=a.device)
    lower, info = implementation.cholesky_(a)
    return lower, info


@accepts_dlpack
def solve_right(lower: Tensor, rhs: Tensor, backend: str = "auto") -> Tensor:
    """`rhs A^{-1}` for each member of a batch, with `A = L L^T`.

    Args:
        lower: L (..., in, in) as `cholesky_` returns it, or any other; what is above the diagonal is not read.
        rhs: (..., rows, in), in the dtype and on the device of `lower`, any strides.
        backend: "auto", "torch" or "cuda".

    Returns:
        A new tensor (..., rows, in).

    Raises:
        ShapeMismatchError: lower is not square, or rhs does not fit it.
        ConfigError: a dtype or device that does not fit, an unknown backend.
        BackendError: the backend asked for cannot run this call.
    """
    check_square("lower", lower)
    check_dtype("lower", lower.dtype, SUMMED)
    if rhs.ndim != lower.ndim or rhs.shape[:-2] != lower.shape[:-2] or rhs.shape[-1] != lower.shape[-1]:
        raise ShapeMismatchError(
            f"rhs must be (..., rows, in) for lower {tuple(lower.shape)}, and is {tuple(rhs.shape)}"
        )
    if rhs.dtype != lower.dtype or rhs.device != lower.device:
        raise ConfigError(f"rhs is {rhs.dtype} on {rhs.device}, lower {lower.dtype} on {lower.device}; convert one")
    implementation = _select(lower, backend)
    solution: Tensor = implementation.solve_right(lower, rhs) if rhs.numel() else torch.empty_like(rhs)
    return solution


def _select(matrix: Tensor, backend: str) -> Any:
    self_check = (_self_check, matrix.dtype)
    return _dispatch.select("cholesky", IMPLEMENTATIONS, backend, matrix.device, matrix, self_check=self_check)


def _self_check(implementation: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Three ragged matrices, the second of them indefinite, beside torch in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 203, 203, generator=generator, dtype=torch.float64)
    a = (x @ x.mT / 203 + torch.eye(203, dtype=torch.float64)).to(device)
    a[1, 149, 149] = -1.0
    rhs = torch.randn(3, 50, 203, generator=generator, dtype=torch.float64).to(device)
    lower, info = implementation.cholesky_(a.to(dtype, copy=True))
    if info.tolist() != [0, 150, 0]:
        return f"its info is {info.tolist()}, where minor 150 of the second of three matrices is not positive definite"
    good, good_rhs = a[::2].contiguous(), rhs[::2]
    expected, _ = reference.cholesky_(good)
    wrong = _dispatch.disagreement(lower[::2], expected)
    if wrong is None:
        solved = implementation.solve_right(lower[::2].contiguous(), good_rhs.to(dtype))
        wrong = _dispatch.disagreement(solved, reference.solve_right(expected, good_rhs))
    return wrong

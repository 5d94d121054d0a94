"""The one place for tolerances. Truth is the reference in float64; loosening anything here is a commit of its own."""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding errors, in units of the dtype's eps relative to the largest true value, that are always allowed.
ALLOWED_EPS = 4.0
# For float64 the truth has rounding errors of its own, as many as the result.
ALLOWED_EPS_FLOAT64 = 16.0
# A fast kernel may err this many times what torch errs in the same dtype.
ALLOWED_FACTOR = 2.0
# Normwise backward error of a solve, in units of eps times the order of the matrix.
ALLOWED_BACKWARD_EPS = 4.0

# What a product may lose, relative to the product of the magnitudes: the factors' rounding errors, to 11 bits in TF32.
ALLOWED_LOSS = {"tf32x3": 2.0**-20, "tf32": 2.0**-9.9}


def relative_error(got: Tensor, truth: Tensor) -> float:
    """max |got - truth| / max |truth|, in float64; infinite when `got` is not finite."""
    assert truth.dtype == torch.float64, "truth is the reference in float64"
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    if not bool(got.isfinite().all()):
        return float("inf")
    scale = truth.abs().max().item()
    error = (got.double() - truth).abs().max().item()
    return error / scale if scale else error


def assert_as_good_as_torch(got: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    """`got` errs at most twice what plain torch errs in the same dtype, plus a few eps of that dtype."""
    assert got.dtype == same_dtype.dtype
    error, torch_error = relative_error(got, truth), relative_error(same_dtype, truth)
    allowed = ALLOWED_EPS_FLOAT64 if got.dtype == torch.float64 else ALLOWED_EPS
    limit = ALLOWED_FACTOR * torch_error + allowed * torch.finfo(got.dtype).eps
    assert error <= limit, f"relative error {error:.3e} > {limit:.3e} (torch in {got.dtype}: {torch_error:.3e})"


def assert_as_precise(got: Tensor, same_dtype: Tensor, truth: Tensor, magnitude: Tensor, precision: str) -> None:
    """`got` errs no more than `precision` allows; `magnitude` is `truth` with every factor's absolute value."""
    if precision == "ieee" or got.device.type == "cpu":
        assert_as_good_as_torch(got, same_dtype, truth)
        return
    error, torch_error = ((tensor.double() - truth).abs().max().item() for tensor in (got, same_dtype))
    rounding = ALLOWED_EPS * torch.finfo(got.dtype).eps * truth.abs().max().item()
    limit = ALLOWED_FACTOR * torch_error + rounding + ALLOWED_LOSS[precision] * magnitude.max().item()
    assert error <= limit, f"error {error:.3e} > {limit:.3e} with {precision} (torch: {torch_error:.3e})"


def backward_error(X: Tensor, A: Tensor, B: Tensor) -> float:
    """Normwise backward error of X as solution of X A = B: ||B - X A|| / (||X|| ||A|| + ||B||), Frobenius."""
    X, A, B = X.double(), A.double(), B.double()
    bound = X.norm() * A.norm() + B.norm()
    return float((B - X @ A).norm() / bound) if bound else 0.0


def assert_backward_stable(X: Tensor, A: Tensor, B: Tensor) -> None:
    """X solves X A = B as exactly as its dtype allows, whatever the condition of A."""
    error, limit = backward_error(X, A, B), ALLOWED_BACKWARD_EPS * A.shape[-1] * torch.finfo(X.dtype).eps
    assert error <= limit, f"backward error {error:.3e} > {limit:.3e} for {tuple(A.shape)} in {X.dtype}"

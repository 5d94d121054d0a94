"""The solution for one more ridge, or any other filter, out of an eigendecomposition: one scaled product, straight into a weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.ops import _dispatch, _triton
from bmm_engine.ops._checks import STORED, SUMMED, check_device, check_dtype
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.ops.spectral import cpu, cuda, reference

IMPLEMENTATIONS = {
    "torch": reference,
    "cpu": cpu,
    "cuda": cuda,
    "triton": _triton.Kernels("bmm_engine.ops.spectral.triton_kernel"),
}


@accepts_dlpack
@torch.no_grad()
def apply_spectral(
    out: Tensor,
    anchor: Tensor,
    projected: Tensor,
    eigenvectors: Tensor,
    eigenvalues: Tensor | None = None,
    ridge: float | None = None,
    *,
    factors: Tensor | None = None,
    base: Tensor | None = None,
    scale: float = 1.0,
    precision: str = "ieee",
    backend: str = "auto",
) -> Tensor:
    """The merged weight for one ridge or other filter, written into `out`: with `A_0 = Q diag(e) Q^T` and `B = R Q`,
    `W* = W_a + B diag(1 / (e + lam)) Q^T`, or `W* = W_a + B diag(f(e) / e) Q^T`, and `out = W_0 + s (W* - W_0)`.

    Args:
        out: (out, in), float32, bfloat16, float16 or float64, any strides: it may be a live (transposed) parameter. It
            may be the anchor or the base, but must not overlap an input otherwise. Gradients are not recorded.
        anchor: W_a (out, in) in any of these dtypes.
        projected: B (out, in), float32 or float64: the dtype in which all is computed, rounded once to that of `out`.
        eigenvectors: Q (in, in), eigenvectors as columns, in the dtype of B.
        eigenvalues: e (in,), float32 or float64, with a ridge. Negative ones (rounding) count as 0.
        ridge: lam >= 0; inf gives the anchor. Where `e + lam` is 0 nothing is moved.
        factors: `f(e) / e` (in,), float32 or float64, in the place of both: of any filter f (`bmm_engine.Filter`).
        base: W_0 (out, in) in any of the dtypes of the anchor; needed where `scale` is not 1, else not read.
        scale: s, finite.
        precision: "ieee", "tf32x3" or "tf32": the least exactness accepted where a GPU multiplies float32; "cpu" and
            "torch" are always "ieee".
        backend: "auto", "torch", "cpu", "cuda" or "triton".

    Returns:
        out itself.

    Raises:
        ShapeMismatchError: a tensor does not fit `out`.
        ConfigError: a dtype or device that does not fit, a number out of range, no base, neither or both of ridge and factors, an
            unknown backend or precision.
        BackendError: the backend asked for cannot run this call.
    """
    _dispatch.check_precision(precision)
    if scale == 1:
        base = None
    _check(out, anchor, projected, eigenvectors, eigenvalues, ridge, factors, base, scale)
    self_check = (_self_check, out.dtype, anchor.dtype, projected.dtype, precision)
    call = (out, anchor, projected, eigenvectors, base)
    implementation = _dispatch.select("spectral", IMPLEMENTATIONS, backend, out.device, *call, self_check=self_check)
    if out.numel():
        shrinkage = _shrinkage(eigenvalues, ridge, factors, scale, projected.dtype)
        implementation.apply_spectral(out, anchor, projected, shrinkage, eigenvectors, base, float(scale), precision)
    return out


def _shrinkage(
    eigenvalues: Tensor | None, ridge: float | None, factors: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """`s / (max(e, 0) + lam)` (in,), 0 where the denominator is 0; or s times the factors."""
    if factors is not None:
        shrinkage = factors.double() * scale
    else:
        assert eigenvalues is not None
        denominator = eigenvalues.double().clamp(min=0).add_(ridge or 0.0)
        shrinkage = torch.where(denominator == 0, 0.0, scale / denominator)
    # Subnormal denominators: a finite number, since B is 0 where e is, and 0 times infinity would be NaN.
    limit = torch.finfo(dtype).max
    return shrinkage.clamp_(-limit, limit).to(dtype)


def _check(
    out: Tensor,
    anchor: Tensor,
    projected: Tensor,
    eigenvectors: Tensor,
    eigenvalues: Tensor | None,
    ridge: float | None,
    factors: Tensor | None,
    base: Tensor | None,
    scale: float,
) -> None:
    """Raises what `apply_spectral` documents."""
    if out.ndim != 2:
        raise ShapeMismatchError(f"out must be (out, in), and is {tuple(out.shape)}")
    if (ridge is None) == (factors is None):
        raise ConfigError("give a ridge, with the eigenvalues, or factors of each direction, and not both")
    if ridge is not None and eigenvalues is None:
        raise ConfigError(f"ridge is {ridge}, which needs the eigenvalues that it is added to")
    if ridge is not None and not ridge >= 0:
        raise ConfigError(f"ridge must be >= 0, and is {ridge}")
    if not math.isfinite(scale):
        raise ConfigError(f"scale must be finite, and is {scale}")
    if scale != 1 and base is None:
        raise ConfigError(f"scale is {scale}, which needs base: out = W_0 + s (W* - W_0)")
    n = out.shape[1]
    for name, tensor, shape, dtypes in (
        ("out", out, out.shape, STORED),
        ("anchor", anchor, out.shape, STORED),
        ("base", base, out.shape, STORED),
        ("projected", projected, out.shape, SUMMED),
        ("eigenvectors", eigenvectors, (n, n), SUMMED),
        ("eigenvalues", eigenvalues, (n,), SUMMED),
        ("factors", factors, (n,), SUMMED),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ShapeMismatchError(
                f"{name} must be {tuple(shape)} for out {tuple(out.shape)}, and is {tuple(tensor.shape)}"
            )
        check_device(name, tensor, "out", out)
        check_dtype(name, tensor.dtype, dtypes)
    if eigenvectors.dtype != projected.dtype:
        raise ConfigError(
            f"projected and eigenvectors must have one dtype, and are {projected.dtype} and {eigenvectors.dtype}"
        )


def _self_check(
    implementation: Any,
    device: torch.device,
    out_dtype: torch.dtype,
    anchor_dtype: torch.dtype,
    dtype: torch.dtype,
    precision: str,
) -> str | None:
    """A ragged module with a base, beside torch in float64."""
    generator = torch.Generator().manual_seed(0)
    anchor, projected = (torch.randn(150, 203, generator=generator).to(device) for _ in range(2))
    anchor, projected, base = anchor.to(anchor_dtype), projected.to(dtype), anchor.mul(0.5).to(anchor_dtype)
    eigenvectors = torch.randn(203, 203, generator=generator).to(device, dtype)
    shrinkage = torch.rand(203, generator=generator).to(device, dtype)
    out = torch.empty(150, 203, dtype=out_dtype, device=device)
    truth = torch.empty(150, 203, dtype=torch.float64, device=device)
    wide = (projected.double(), shrinkage.double(), eigenvectors.double())
    reference.apply_spectral(truth, anchor, *wide, base, 0.5, "ieee")
    implementation.apply_spectral(out, anchor, projected, shrinkage, eigenvectors, base, 0.5, precision)
    # `out` is rounded to its dtype, where float64 is not: the tolerance of the coarsest.
    return _dispatch.disagreement(out, truth, precision if out_dtype.itemsize > 2 else "tf32")

"""Assembly of the regression's system matrix out of the experts' Grams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.ops import _dispatch, _triton
from bmm_engine.ops._checks import SUMMED, check_amount, check_dtype, check_like, check_square, result_dtype
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.ops.assemble import cpu, cuda, reference

IMPLEMENTATIONS = {
    "torch": reference,
    "cpu": cpu,
    "cuda": cuda,
    "triton": _triton.Kernels("bmm_engine.ops.assemble.triton_kernel"),
}


@accepts_dlpack
def assemble(
    grams: Sequence[Tensor],
    weights: Sequence[float],
    ridge: float | Sequence[float] | Tensor,
    *,
    shrink: float = 1.0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The system matrix `A = sum_t beta_t G_t + lam I` of the ridge regression.

    Args:
        grams: T >= 1 tensors G_t (..., in, in), float32 or float64 each, of one shape on one device.
        weights: T numbers beta_t, finite and >= 0.
        ridge: lam, finite and >= 0; or one number per member of a batch, its leading dimensions flattened.
        shrink: what the entries off the diagonal of the sum are multiplied by, in [0, 1]: RegMean's alpha (Jin et al.
            2023, arXiv 2212.09849).
        out_dtype: float32 or float64, the dtype of A and of the sum; by default that of `out`, else the widest of the
            Grams.
        out: where A goes; it may be one of the Grams, but must not overlap one otherwise.
        backend: "auto", "torch", "cpu", "cuda" or "triton".

    Returns:
        A (..., in, in): `out` where it is given.

    Raises:
        ShapeMismatchError: Grams that are not square or differ in shape, `out` of another shape, T differing, ridges
            that are not one per member.
        ConfigError: no Grams, a dtype or device that does not fit, a number out of range, an unknown backend.
        BackendError: the backend asked for cannot run this call.
    """
    if isinstance(ridge, Tensor):
        ridge = ridge.tolist() if ridge.ndim < 2 else ridge.flatten().tolist()
    many = hasattr(ridge, "__len__")
    ridges = [float(value) for value in ridge] if many else [float(ridge)]  # type: ignore[union-attr, arg-type]
    out_dtype = _check(grams, weights, ridges, shrink, out_dtype, out)
    first = grams[0]
    batch = math.prod(first.shape[:-2])
    if many and len(ridges) != batch:
        raise ShapeMismatchError(
            f"{len(ridges)} ridges for {batch} members of {tuple(first.shape)}; give one number, or one for each"
        )
    if out is None:
        out = torch.empty(first.shape, dtype=out_dtype, device=first.device)
    self_check = (_self_check, tuple(dict.fromkeys(gram.dtype for gram in grams)), out_dtype)
    implementation = _dispatch.select(
        "assemble", IMPLEMENTATIONS, backend, out.device, grams, out, self_check=self_check
    )
    if out.numel():
        implementation.assemble(grams, [float(weight) for weight in weights], ridges, float(shrink), out)
    return out


def _check(
    grams: Sequence[Tensor],
    weights: Sequence[float],
    ridges: Sequence[float],
    shrink: float,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
) -> torch.dtype:
    """Raises what `assemble` documents; returns the dtype of A."""
    if not grams:
        raise ConfigError("assemble needs at least one Gram")
    if len(grams) != len(weights):
        raise ShapeMismatchError(f"{len(grams)} Grams, but {len(weights)} weights")
    first = grams[0]
    check_square("a Gram", first)
    for name, tensor in [*((f"grams[{t}]", gram) for t, gram in enumerate(grams)), ("out", out)]:
        if tensor is not None:
            check_like(name, tensor, "grams[0]", first)
            check_dtype(name, tensor.dtype, SUMMED)
    for name, value in [
        *((f"weights[{t}]", weight) for t, weight in enumerate(weights)),
        *(("ridge", r) for r in ridges),
    ]:
        check_amount(name, value)
    if not 0 <= shrink <= 1:
        raise ConfigError(f"shrink must be in [0, 1], and is {shrink}")
    return result_dtype(out_dtype, out, SUMMED, grams)


def _self_check(
    implementation: Any, device: torch.device, dtypes: tuple[torch.dtype, ...], out_dtype: torch.dtype
) -> str | None:
    """Three ragged Grams in a batch of two, shrunk, beside torch in float64."""
    generator = torch.Generator().manual_seed(0)
    grams = [torch.randn(2, 131, 131, generator=generator).to(device, dtypes[t % len(dtypes)]) for t in range(3)]
    out = torch.empty(2, 131, 131, dtype=out_dtype, device=device)
    truth = torch.empty_like(out, dtype=torch.float64)
    call = ([0.5, 1.0, 2.0], [0.25, 4.0], 0.75)
    reference.assemble(grams, *call, truth)
    implementation.assemble(grams, *call, out)
    return _dispatch.disagreement(out, truth)

"""Assembly of the regression's system matrix out of the experts' Grams."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.ops import _dispatch
from bmm_engine.ops.assemble import cpu, cuda, reference

IMPLEMENTATIONS = {"torch": reference, "cpu": cpu, "cuda": cuda}

_DTYPES = (torch.float32, torch.float64)


def assemble(
    grams: Sequence[Tensor],
    weights: Sequence[float],
    ridge: float,
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The system matrix `A = sum_t beta_t G_t + lam I` of the ridge regression.

    Args:
        grams: T >= 1 tensors G_t (..., in, in), float32 or float64 each, of one shape on one device.
        weights: T numbers beta_t, finite and >= 0.
        ridge: lam, finite and >= 0.
        out_dtype: float32 or float64, the dtype of A and of the sum; by default that of `out`, else the widest of the
            Grams.
        out: where A goes; it may be one of the Grams, but must not overlap one otherwise.
        backend: "auto", "torch", "cpu" or "cuda".

    Returns:
        A (..., in, in): `out` where it is given.

    Raises:
        ShapeMismatchError: Grams that are not square or differ in shape, `out` of another shape, T differing.
        ConfigError: no Grams, a dtype or device that does not fit, a number out of range, an unknown backend.
        BackendError: the backend asked for cannot run this call.
    """
    out_dtype = _check(grams, weights, ridge, out_dtype, out)
    if out is None:
        out = torch.empty(grams[0].shape, dtype=out_dtype, device=grams[0].device)
    implementation = _dispatch.select("assemble", IMPLEMENTATIONS, backend, out.device, grams, out)
    implementation.assemble(grams, [float(weight) for weight in weights], float(ridge), out)
    return out


def _check(
    grams: Sequence[Tensor],
    weights: Sequence[float],
    ridge: float,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
) -> torch.dtype:
    """Raises what `assemble` documents; returns the dtype of A."""
    if not grams:
        raise ConfigError("assemble needs at least one Gram")
    if len(grams) != len(weights):
        raise ShapeMismatchError(f"{len(grams)} Grams, but {len(weights)} weights")
    first = grams[0]
    if first.ndim < 2 or first.shape[-1] != first.shape[-2]:
        raise ShapeMismatchError(f"a Gram must be (..., in, in), and is {tuple(first.shape)}")
    for name, tensor in [*((f"grams[{t}]", gram) for t, gram in enumerate(grams)), ("out", out)]:
        if tensor is None:
            continue
        if tensor.shape != first.shape:
            raise ShapeMismatchError(f"{name} is {tuple(tensor.shape)}, grams[0] is {tuple(first.shape)}")
        if tensor.device != first.device:
            raise ConfigError(f"{name} is on {tensor.device}, grams[0] on {first.device}; move one of them")
        if tensor.dtype not in _DTYPES:
            raise ConfigError(f"{name} must be float32 or float64, not {tensor.dtype}")
    for name, value in [*((f"weights[{t}]", weight) for t, weight in enumerate(weights)), ("ridge", ridge)]:
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name} must be finite and >= 0, and is {value}")
    if out is not None and out_dtype not in (None, out.dtype):
        raise ConfigError(f"out_dtype is {out_dtype}, but out is {out.dtype}; give one of them")
    if out is not None:
        return out.dtype
    if out_dtype not in (None, *_DTYPES):
        raise ConfigError(f"out_dtype must be float32 or float64, not {out_dtype}")
    return out_dtype or (torch.float64 if any(gram.dtype == torch.float64 for gram in grams) else torch.float32)

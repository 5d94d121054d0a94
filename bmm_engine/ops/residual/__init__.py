"""The right-hand side of the regression: how far the experts are from the anchor, weighted by their Grams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.ops import _dispatch, _triton
from bmm_engine.ops._checks import STORED, SUMMED, check_amount, check_device, check_dtype, result_dtype
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.ops.residual import cpu, cuda, reference

IMPLEMENTATIONS = {
    "torch": reference,
    "cpu": cpu,
    "cuda": cuda,
    "triton": _triton.Kernels("bmm_engine.ops.residual.triton_kernel"),
}


@accepts_dlpack
def residual(
    anchor: Tensor,
    experts: Sequence[Tensor],
    grams: Sequence[Tensor],
    weights: Sequence[float],
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    precision: str = "ieee",
    backend: str = "auto",
) -> Tensor:
    """The residual `R = sum_t beta_t (W_t - W_a) G_t` of the ridge regression.

    Args:
        anchor: W_a (..., out, in), float32, bfloat16, float16 or float64.
        experts: T >= 1 tensors W_t of the anchor's shape and device, each in any of these dtypes.
        grams: T tensors G_t (..., in, in), float32 or float64 each, symmetric.
        weights: T numbers beta_t, finite and >= 0. What belongs to a weight of 0 is not read.
        out_dtype: float32 or float64, the dtype of R, of `W_t - W_a` and of the sum; by default that of `out`, else
            the widest of all inputs, at least float32.
        out: where R goes; it must not overlap an input.
        precision: "ieee", "tf32x3" or "tf32": the least exactness accepted where a GPU multiplies float32; "cpu" and
            "torch" are always "ieee".
        backend: "auto", "torch", "cpu", "cuda" or "triton".

    Returns:
        R (..., out, in): `out` where it is given.

    Raises:
        ShapeMismatchError: experts, Grams or `out` that do not fit the anchor, T differing.
        ConfigError: no experts, a dtype or device that does not fit, a number out of range, an unknown backend or
            precision.
        BackendError: the backend asked for cannot run this call.
    """
    _dispatch.check_precision(precision)
    out_dtype = _check(anchor, experts, grams, weights, out_dtype, out)
    if out is None:
        out = torch.empty(anchor.shape, dtype=out_dtype, device=anchor.device)
    kept = [t for t, weight in enumerate(weights) if weight]
    if not kept or not out.numel():
        return out.zero_()
    experts, grams = [experts[t] for t in kept], [grams[t] for t in kept]
    self_check = (_self_check, (anchor.dtype, experts[0].dtype), grams[0].dtype, out_dtype, precision)
    implementation = _dispatch.select(
        "residual", IMPLEMENTATIONS, backend, anchor.device, anchor, experts, grams, out, self_check=self_check
    )
    implementation.residual(anchor, experts, grams, [float(weights[t]) for t in kept], out, precision)
    return out


def _check(
    anchor: Tensor,
    experts: Sequence[Tensor],
    grams: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None,
    out: Tensor | None,
) -> torch.dtype:
    """Raises what `residual` documents; returns the dtype of R."""
    if not experts:
        raise ConfigError("residual needs at least one expert")
    if not len(experts) == len(grams) == len(weights):
        raise ShapeMismatchError(f"{len(experts)} experts, {len(grams)} Grams and {len(weights)} weights")
    if anchor.ndim < 2:
        raise ShapeMismatchError(f"the anchor must be (..., out, in), and is {tuple(anchor.shape)}")
    square = (*anchor.shape[:-2], anchor.shape[-1], anchor.shape[-1])
    named = [
        ("anchor", anchor, anchor.shape, STORED),
        *((f"experts[{t}]", expert, anchor.shape, STORED) for t, expert in enumerate(experts)),
        *((f"grams[{t}]", gram, square, SUMMED) for t, gram in enumerate(grams)),
    ]
    if out is not None:
        named.append(("out", out, anchor.shape, SUMMED))
    for name, tensor, shape, dtypes in named:
        if tensor.shape != shape:
            raise ShapeMismatchError(
                f"{name} must be {tuple(shape)} for an anchor {tuple(anchor.shape)}, and is {tuple(tensor.shape)}"
            )
        check_device(name, tensor, "the anchor", anchor)
        check_dtype(name, tensor.dtype, dtypes)
    for t, weight in enumerate(weights):
        check_amount(f"weights[{t}]", weight)
    return result_dtype(out_dtype, out, SUMMED, (anchor, *experts, *grams))


def _self_check(
    implementation: Any,
    device: torch.device,
    weight_dtypes: tuple[torch.dtype, torch.dtype],
    gram_dtype: torch.dtype,
    out_dtype: torch.dtype,
    precision: str,
) -> str | None:
    """Two experts of a ragged module, beside torch in float64."""
    generator = torch.Generator().manual_seed(0)
    first, second = (dtype for dtype in weight_dtypes)
    anchor = torch.randn(150, 203, generator=generator).to(device, first)
    experts = [torch.randn(150, 203, generator=generator).to(device, second) for _ in range(2)]
    grams = [torch.randn(203, 203, generator=generator) for _ in range(2)]
    grams = [(gram @ gram.T).to(device, gram_dtype) for gram in grams]
    out = torch.empty(150, 203, dtype=out_dtype, device=device)
    truth = torch.empty(150, 203, dtype=torch.float64, device=device)
    reference.residual(anchor, experts, grams, [0.5, 2.0], truth, "ieee")
    implementation.residual(anchor, experts, grams, [0.5, 2.0], out, precision)
    return _dispatch.disagreement(out, truth, precision)

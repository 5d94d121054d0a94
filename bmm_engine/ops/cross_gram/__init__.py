"""Cross-Gram accumulation: the second moment between two inputs of one module, for sequential merging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.ops import _dispatch, _triton
from bmm_engine.ops._checks import check_device, check_dtype
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.ops.cross_gram import cpu, reference
from bmm_engine.ops.gram import (
    ACCUMULATE_DTYPES,
    accumulate_gram,
    check_row_weights,
    checked_weights,
    example_weights,
    weighting,
)

IMPLEMENTATIONS = {
    "torch": reference,
    "cpu": cpu,
    "triton": _triton.Kernels("bmm_engine.ops.cross_gram.triton_kernel"),
}


@accepts_dlpack
def accumulate_cross_gram(
    C: Tensor,
    X: Tensor,
    Y: Tensor,
    row_weights: Tensor | None = None,
    *,
    G: Tensor | None = None,
    precision: str = "ieee",
    backend: str = "auto",
) -> Tensor:
    """Add pairs of rows to a cross-Gram, in place: `C += X^T diag(w) Y`; in the same pass `G += Y^T diag(w) Y`.

    Args:
        C: (in_x, in_y), float32, or float64 for float64 rows.
        X, Y: (..., in_x) and (..., in_y), alike but for the last dimension: float32, bfloat16, float16 (accumulated in
            float32) or float64 (in float64). Any strides. On the device of C.
        row_weights: None for ones, else of shape X.shape[:-1], float or bool, finite and >= 0. A pair of weight 0 is
            left out whatever it holds, NaN included. On a GPU prefer bool where it will do: floats are checked, which
            waits for the device.
        G: (in_y, in_y) in the dtype of C, or None. Symmetric on entry, and exactly symmetric on return. C and G must not
            share memory.
        precision: "ieee", "tf32x3" or "tf32": the least exactness accepted where a GPU multiplies float32 rows; "cpu"
            and "torch" are always "ieee". 16-bit rows are multiplied exactly whatever is given; a processor's own dot
            product of bfloat16 takes subnormal numbers (below 1.2e-38) as zero.
        backend: "auto", "torch", "cpu" or "triton".

    Returns:
        C itself. No rows, or none of positive weight, leave C and G as they are.

    Raises:
        ShapeMismatchError: C is not (in_x, in_y), G not (in_y, in_y), X and Y or row_weights differ in their rows.
        ConfigError: a dtype or device that does not fit, a weight that is negative or not finite, an unknown backend
            or precision.
        BackendError: the backend asked for cannot run this call.

    The bits depend on backend, machine and chunking, not on the thread count.
    """
    _dispatch.check_precision(precision)
    _check(C, X, Y, row_weights, G)
    self_check = (_self_check, X.dtype, weighting(row_weights), precision)
    implementation = _dispatch.select(
        "cross_gram", IMPLEMENTATIONS, backend, X.device, C, X, Y, G, self_check=self_check
    )
    if C.numel() == 0:  # X or Y has no columns, but Y's Gram may be wanted
        if G is not None:
            accumulate_gram(G, Y, row_weights, precision=precision)
        return C
    if X.numel() == 0:
        return C
    weights = checked_weights(row_weights, C.dtype, implementation)
    implementation.accumulate_cross_gram(C, X, Y, weights, G, precision)
    return C


def _check(C: Tensor, X: Tensor, Y: Tensor, row_weights: Tensor | None, G: Tensor | None) -> None:
    if X.ndim == 0 or Y.ndim == 0 or X.shape[:-1] != Y.shape[:-1]:
        raise ShapeMismatchError(
            f"X (..., in_x) and Y (..., in_y) must have the same rows; X is {tuple(X.shape)}, Y is {tuple(Y.shape)}"
        )
    if C.shape != (X.shape[-1], Y.shape[-1]):
        raise ShapeMismatchError(
            f"C must be (in_x, in_y) for X {tuple(X.shape)} and Y {tuple(Y.shape)}, and is {tuple(C.shape)}"
        )
    if G is not None and G.shape != (Y.shape[-1], Y.shape[-1]):
        raise ShapeMismatchError(f"G must be (in_y, in_y) for Y {tuple(Y.shape)}, and is {tuple(G.shape)}")
    check_dtype("X", X.dtype, ACCUMULATE_DTYPES)
    if Y.dtype != X.dtype:
        raise ConfigError(f"X and Y must have one dtype; X is {X.dtype}, Y is {Y.dtype}")
    for name, tensor in (("C", C), ("G", G)):
        if tensor is not None and tensor.dtype != ACCUMULATE_DTYPES[X.dtype]:
            raise ConfigError(
                f"rows in {X.dtype} accumulate in {ACCUMULATE_DTYPES[X.dtype]}, but {name} is {tensor.dtype}"
            )
    for name, tensor in (("C", C), ("Y", Y), ("G", G)):
        if tensor is not None:
            check_device(name, tensor, "X", X)
    if G is not None and G.numel() and G.data_ptr() == C.data_ptr():
        raise ConfigError("C and G share their memory; give each its own")
    check_row_weights(row_weights, X)


def _self_check(implementation: Any, device: torch.device, dtype: torch.dtype, kind: str, precision: str) -> str | None:
    """Beside torch in float64: several tiles and splits; several tiles."""
    generator = torch.Generator().manual_seed(0)
    accumulate = ACCUMULATE_DTYPES[dtype]
    for rows in (1100, 100):
        X, Y = (torch.randn(rows, n, generator=generator).to(dtype).to(device) for n in (208, 304))
        weights = example_weights(kind, rows, generator, device)
        C, G = (torch.ones(n, 304, dtype=accumulate, device=device) for n in (208, 304))
        truth = C.to(torch.float64, copy=True), G.to(torch.float64, copy=True)
        wide = None if weights is None else weights.double()
        reference.accumulate_cross_gram(truth[0], X, Y, wide, truth[1], "ieee")
        own = checked_weights(weights, accumulate, implementation)
        implementation.accumulate_cross_gram(C, X, Y, own, G, precision)
        for got, true in zip((C, G), truth, strict=True):
            if reason := _dispatch.disagreement(got, true, precision):
                return reason
        if not torch.equal(G, G.T):
            return "it leaves a Gram that is not symmetric"
    return None

"""`out = s W_a + (1 - s) W_0 + B diag(shrinkage) Q^T` in plain torch: the specification, for any dtype and device."""

from __future__ import annotations

from torch import Tensor

from bmm_engine.ops import _dispatch


def supports(out: Tensor, anchor: Tensor, projected: Tensor, eigenvectors: Tensor, base: Tensor | None) -> str | None:
    return None


def apply_spectral(
    out: Tensor,
    anchor: Tensor,
    projected: Tensor,
    shrinkage: Tensor,
    eigenvectors: Tensor,
    base: Tensor | None,
    scale: float,
    precision: str,
) -> None:
    """`shrinkage` (in,) holds the scale; `base` is None where the scale is 1. `precision` is ignored: always "ieee"."""
    with _dispatch.exact_matmul():
        merged = (projected * shrinkage) @ eigenvectors.T
    merged.add_(anchor.to(merged.dtype), alpha=scale)
    if base is not None:
        merged.add_(base.to(merged.dtype), alpha=1 - scale)
    out.copy_(merged)

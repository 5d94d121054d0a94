"""`C += X^T diag(w) Y` and `G += Y^T diag(w) Y` in plain torch: the specification, for any dtype and device."""

from __future__ import annotations

from torch import Tensor

from bmm_engine.ops import _dispatch
from bmm_engine.ops.gram import reference as gram


def supports(C: Tensor, X: Tensor, Y: Tensor, G: Tensor | None) -> str | None:
    return None


def accumulate_cross_gram(
    C: Tensor, X: Tensor, Y: Tensor, row_weights: Tensor | None, G: Tensor | None, precision: str
) -> None:
    """`precision` is ignored: this is always "ieee"."""
    left, right = X.reshape(-1, X.shape[-1]), Y.reshape(-1, Y.shape[-1])  # (rows, in_x), (rows, in_y)
    if row_weights is None:
        left, right = left.to(C.dtype), right.to(C.dtype)
    else:
        weights = row_weights.reshape(-1)
        kept = weights != 0
        left, right = left[kept].to(C.dtype) * weights[kept, None], right[kept].to(C.dtype)
    with _dispatch.exact_matmul():
        C.copy_(C.addmm(left.T, right))
    if G is not None:
        gram.accumulate_gram(G, Y, row_weights, precision)

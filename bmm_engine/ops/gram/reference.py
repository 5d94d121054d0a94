"""`G += X^T diag(w) X` in plain torch: the specification, for any dtype and device."""

from __future__ import annotations

from torch import Tensor

from bmm_engine.ops import _dispatch


def supports(G: Tensor, X: Tensor) -> str | None:
    return None


def accumulate_gram(G: Tensor, X: Tensor, row_weights: Tensor | None, precision: str) -> None:
    """`precision` is ignored: this is always "ieee"."""
    rows = X.reshape(-1, X.shape[-1])  # (rows, in)
    if row_weights is None:
        left = rows = rows.to(G.dtype)
    else:
        weights = row_weights.reshape(-1)
        rows = rows[weights != 0].to(G.dtype)
        left = rows * weights[weights != 0, None]
    with _dispatch.exact_matmul():
        upper = G.addmm(left.T, rows).triu()
    G.copy_(upper + upper.triu(1).T)

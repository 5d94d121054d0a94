"""Gram accumulation: the second moment of a module's inputs, added up chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.ops import _dispatch
from bmm_engine.ops.gram import cpu, reference

IMPLEMENTATIONS = {"torch": reference, "cpu": cpu}

# What each dtype of rows is accumulated in, and so the dtype of G.
ACCUMULATE_DTYPES = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


def accumulate_gram(G: Tensor, X: Tensor, row_weights: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Add the rows of X to a Gram, in place: `G += X^T diag(w) X`.

    Args:
        G: (in, in), float32, or float64 for float64 rows. Symmetric on entry, and exactly symmetric on return.
        X: (..., in), float32, bfloat16, float16 (accumulated in float32) or float64 (in float64). Any strides; never
            copied whole by the "cpu" backend. On the device of G.
        row_weights: None for ones, else of shape X.shape[:-1], float or bool, finite and >= 0. A row of weight 0 is
            left out whatever it holds, NaN included.
        backend: "auto", "torch" or "cpu".

    Returns:
        G itself. No rows, or none of positive weight, leave it as it is.

    Raises:
        ShapeMismatchError: G is not (in, in), or row_weights is not X.shape[:-1].
        ConfigError: a dtype or device that does not fit, a weight that is negative or not finite, an unknown backend.
        BackendError: the backend asked for cannot run this call.

    The bits depend on backend, machine and chunking, not on the thread count.
    """
    _check(G, X, row_weights)
    implementation = _dispatch.select("gram", IMPLEMENTATIONS, backend, X.device, G, X)
    if X.numel() == 0:
        return G
    if row_weights is not None:
        row_weights = row_weights.to(G.dtype)
        if not bool(((row_weights >= 0) & row_weights.isfinite()).all()):
            raise ConfigError(f"row_weights must be finite and >= 0, and hold {_worst(row_weights)}")
    implementation.accumulate_gram(G, X, row_weights)
    return G


def _check(G: Tensor, X: Tensor, row_weights: Tensor | None) -> None:
    if X.ndim == 0 or G.shape != (X.shape[-1], X.shape[-1]):
        raise ShapeMismatchError(f"G must be (in, in) for X (..., in); G is {tuple(G.shape)}, X is {tuple(X.shape)}")
    if X.dtype not in ACCUMULATE_DTYPES:
        raise ConfigError(f"X must be float32, bfloat16, float16 or float64, not {X.dtype}")
    if G.dtype != ACCUMULATE_DTYPES[X.dtype]:
        raise ConfigError(f"rows in {X.dtype} accumulate in {ACCUMULATE_DTYPES[X.dtype]}, but G is {G.dtype}")
    if G.device != X.device:
        raise ConfigError(f"G is on {G.device}, X on {X.device}; move one of them")
    if row_weights is None:
        return
    if row_weights.shape != X.shape[:-1]:
        raise ShapeMismatchError(
            f"row_weights must be {tuple(X.shape[:-1])}, one per row of X {tuple(X.shape)}, "
            f"and is {tuple(row_weights.shape)}"
        )
    if not (row_weights.is_floating_point() or row_weights.dtype == torch.bool):
        raise ConfigError(f"row_weights must be float or bool, not {row_weights.dtype}")
    if row_weights.device != X.device:
        raise ConfigError(f"row_weights is on {row_weights.device}, X on {X.device}; move one of them")


def _worst(weights: Tensor) -> float:
    return weights[~((weights >= 0) & weights.isfinite())].flatten()[0].item()

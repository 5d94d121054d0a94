"""`G += X^T diag(w) X` in C++ (csrc/cpu/gram.h): half the multiplications, and no copy of X whatever its dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bmm_engine.ops import _native


def supports(G: Tensor, X: Tensor) -> str | None:
    if X.device.type != "cpu":
        return f"X is on {X.device}, not in CPU memory"
    if G.stride(-1) != 1 or G.stride(0) < G.shape[0]:
        return f"G must have rows without gaps, and has strides {G.stride()}"
    return _native.cpu_missing()


def accumulate_gram(G: Tensor, X: Tensor, row_weights: Tensor | None, isa: str = "") -> None:
    """`isa` names an instruction set (see `isas`); "" is the best that the machine runs."""
    for rows, weights in _matrices(X, row_weights):
        weights = None if weights is None else weights.contiguous()
        _native.cpu().gram(
            rows.data_ptr(),
            rows.shape[0],
            rows.shape[1],
            *rows.stride(),
            _native.DTYPE_CODES[rows.dtype],
            0 if weights is None else weights.data_ptr(),
            G.data_ptr(),
            G.stride(0),
            _native.DTYPE_CODES[G.dtype],
            torch.get_num_threads(),
            isa,
        )


def isas() -> list[str]:
    """Instruction sets that are compiled in and that this machine runs, best first."""
    names: list[str] = _native.cpu().gram_isas()
    return names


def _matrices(X: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """X (..., in) as 2-D views with their weights: one where the strides allow it, else one per leading index."""
    try:
        rows = X.view(-1, X.shape[-1])
    except RuntimeError:
        for index in range(X.shape[0]):
            yield from _matrices(X[index], None if weights is None else weights[index])
    else:
        yield rows, None if weights is None else weights.reshape(-1)

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


def accumulate_gram(G: Tensor, X: Tensor, row_weights: Tensor | None, precision: str, isa: str = "") -> None:
    """`isa` names an instruction set (see `isas`); "" is the best that the machine runs."""
    for (rows,), weights in matrices([X], row_weights):
        address = 0 if weights is None else weights.data_ptr()
        _native.cpu().gram(_native.matrix(rows), address, _native.matrix(G), torch.get_num_threads(), isa)


def isas() -> list[str]:
    """Instruction sets that are compiled in and that this machine runs, best first."""
    names: list[str] = _native.cpu().isa_names()
    return names


def matrices(Xs: list[Tensor], weights: Tensor | None) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Tensors (..., in) as 2-D views with their row weights: one where the strides allow it, else one per leading index."""
    try:
        views = [X.view(-1, X.shape[-1]) for X in Xs]
    except RuntimeError:
        for index in range(Xs[0].shape[0]):
            yield from matrices([X[index] for X in Xs], None if weights is None else weights[index])
    else:
        yield views, None if weights is None else weights.reshape(-1).contiguous()

"""`C += X^T diag(w) Y` and `G += Y^T diag(w) Y` in C++ (csrc/cpu/gram.h): Y is packed once for both."""

from __future__ import annotations

import torch
from torch import Tensor

from bmm_engine.ops import _native
from bmm_engine.ops.gram.cpu import matrices


def supports(C: Tensor, X: Tensor, Y: Tensor, G: Tensor | None) -> str | None:
    if X.device.type != "cpu":
        return f"X is on {X.device}, not in CPU memory"
    for name, sums in (("C", C), ("G", G)):
        if sums is not None and (sums.stride(-1) != 1 or sums.stride(0) < sums.shape[1]):
            return f"{name} must have rows without gaps, and has strides {sums.stride()}"
    return _native.cpu_missing()


def accumulate_cross_gram(
    C: Tensor, X: Tensor, Y: Tensor, row_weights: Tensor | None, G: Tensor | None, precision: str, isa: str = ""
) -> None:
    for (x, y), weights in matrices([X, Y], row_weights):
        _native.cpu().cross_gram(
            _native.matrix(x),
            _native.matrix(y),
            0 if weights is None else weights.data_ptr(),
            _native.matrix(C),
            _native.matrix(G),
            torch.get_num_threads(),
            isa,
        )

"""`R = sum_t beta_t (W_t - W_a) G_t` in C++ (csrc/cpu/residual.h): differences and wider copies exist only in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.ops import _native


def supports(anchor: Tensor, experts: Sequence[Tensor], grams: Sequence[Tensor], out: Tensor) -> str | None:
    if out.device.type != "cpu":
        return f"the tensors are on {out.device}, not in CPU memory"
    if out.stride(-1) != 1 or out.stride(-2) < out.shape[-1]:
        return f"R must have rows without gaps, and has strides {out.stride()}"
    return _native.cpu_missing()


def residual(
    anchor: Tensor,
    experts: Sequence[Tensor],
    grams: Sequence[Tensor],
    weights: Sequence[float],
    out: Tensor,
    precision: str,
    isa: str = "",
) -> None:
    if out.dim() > 2:
        for i in range(out.shape[0]):
            residual(anchor[i], [e[i] for e in experts], [g[i] for g in grams], weights, out[i], precision, isa)
        return
    _native.cpu().residual(
        _native.matrix(anchor),
        [_native.matrix(expert) for expert in experts],
        [_native.matrix(gram) for gram in grams],
        list(weights),
        _native.matrix(out),
        torch.get_num_threads(),
        isa,
    )

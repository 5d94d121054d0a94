"""`W_a + B diag(1 / (e + lam)) Q^T` in C++ (csrc/cpu/spectral.h), straight into a weight of any dtype and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from bmm_engine.ops import _native


def supports(out: Tensor, anchor: Tensor, projected: Tensor, eigenvectors: Tensor, base: Tensor | None) -> str | None:
    if out.device.type != "cpu":
        return f"out is on {out.device}, not in CPU memory"
    return _native.cpu_missing()


def apply_spectral(
    out: Tensor,
    anchor: Tensor,
    projected: Tensor,
    shrinkage: Tensor,
    eigenvectors: Tensor,
    base: Tensor | None,
    scale: float,
    precision: str,
    isa: str = "",
) -> None:
    shrinkage = shrinkage.contiguous()
    _native.cpu().spectral(
        _native.matrix(projected),
        shrinkage.data_ptr(),
        _native.matrix(eigenvectors),
        _native.matrix(anchor),
        _native.matrix(base),
        scale,
        _native.matrix(out),
        torch.get_num_threads(),
        isa,
    )

"""`A = sum_t beta_t G_t + lam I` in C++ (csrc/cpu/assemble.h): one pass, no temporaries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.ops import _native


def supports(grams: Sequence[Tensor], out: Tensor) -> str | None:
    if out.device.type != "cpu":
        return f"the Grams are on {out.device}, not in CPU memory"
    if not all(tensor.is_contiguous() for tensor in (*grams, out)):
        return "a Gram or out is not contiguous"
    return _native.cpu_missing()


def assemble(
    grams: Sequence[Tensor], weights: Sequence[float], ridges: Sequence[float], shrink: float, out: Tensor
) -> None:
    _native.cpu().assemble(
        [(gram.data_ptr(), _native.DTYPE_CODES[gram.dtype]) for gram in grams],
        list(weights),
        list(ridges),
        shrink,
        _native.matrix(out.view(-1, out.shape[-1])),
        torch.get_num_threads(),
    )

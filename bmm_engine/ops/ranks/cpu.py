"""Ranks of magnitudes in C++ (csrc/cpu/ranks.h): a radix sort of each row, the rows shared among threads."""

from __future__ import annotations

import torch
from torch import Tensor

from bmm_engine.ops import _native


def supports(x: Tensor, minus: Tensor | None) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, not in CPU memory"
    if not (x.is_contiguous() and (minus is None or minus.is_contiguous())):
        return "x or minus is not contiguous"
    return _native.cpu_missing()


def magnitude_ranks(x: Tensor, minus: Tensor | None, out: Tensor) -> bool:
    n = x.shape[-1]
    numbers: bool = _native.cpu().magnitude_ranks(
        _native.elements(x),
        _native.elements(minus),
        x.numel() // n,
        n,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return numbers

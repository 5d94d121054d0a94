"""Ranks of magnitudes within rows, without a comparison sort: what DELLA's chances are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmm_engine.errors import NonFiniteWeightError, ShapeMismatchError
from bmm_engine.ops import _dispatch
from bmm_engine.ops._checks import STORED, check_dtype, check_like
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.ops.ranks import cpu, reference

IMPLEMENTATIONS: dict[str, Any] = {"torch": reference, "cpu": cpu}


@accepts_dlpack
def magnitude_ranks(x: Tensor, minus: Tensor | None = None, backend: str = "auto") -> Tensor:
    """The normalised rank of each |x - minus| within its row: r / (n - 1), from 0 for the smallest to 1 for the largest.

    r counts the magnitudes of the row that are smaller, or equal and further left: equal magnitudes rank by position.
    Magnitudes are compared in float32; the difference is computed in float64 if x or minus is float64, else in float32.

    Args:
        x: (rows, n), or (n,) for one row; float32, bfloat16, float16 or float64. Infinities are the largest; NaN is an error.
        minus: None, or a tensor of the shape and on the device of x, of any of those dtypes.
        backend: "auto", "torch" or "cpu".

    Returns:
        float32, of the shape of x. An entry alone in its row is its largest: n = 1 gives 1.

    Raises:
        NonFiniteWeightError: |x - minus| holds NaN.
        ShapeMismatchError: x has neither one nor two dimensions, minus another shape.
        ConfigError: a dtype or device that does not fit, an unknown backend.
        BackendError: the backend asked for cannot run this call.
    """
    if x.ndim not in (1, 2):
        raise ShapeMismatchError(f"x must be (rows, n) or (n,), and is {tuple(x.shape)}")
    for name, tensor in [("x", x), *([] if minus is None else [("minus", minus)])]:
        check_like(name, tensor, "x", x)
        check_dtype(name, tensor.dtype, STORED)
    implementation = _dispatch.select("ranks", IMPLEMENTATIONS, backend, x.device, x, minus)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel() and not implementation.magnitude_ranks(x, minus, out):
        nans = int((x if minus is None else x - minus).isnan().sum())
        raise NonFiniteWeightError(
            f"{nans} of {x.numel()} magnitudes are NaN, which has no place in their order; x is {tuple(x.shape)}"
        )
    return out

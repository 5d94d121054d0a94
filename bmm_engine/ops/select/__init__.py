"""Exact selection by magnitude without sorting: two histograms of 16 bits each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, NonFiniteWeightError, ShapeMismatchError
from bmm_engine.ops import _dispatch
from bmm_engine.ops._checks import STORED, check_device, check_dtype
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.ops.select import cpu, cuda, reference

IMPLEMENTATIONS = {"torch": reference, "cpu": cpu, "cuda": cuda}

# Magnitudes order as the bits of their float32 do; without a sign bit, 15 bits are left in the upper half.
UPPER_BINS = 1 << 15
LOWER_BINS = 1 << 16

_INFINITY = 0x7F80  # upper half of infinity's bits; NaNs are beyond it, or share it with other lower bits


@accepts_dlpack
def add_magnitude_histogram(
    counts: Tensor, x: Tensor, upper: int | None = None, backend: str = "auto", *, minus: Tensor | None = None
) -> Tensor:
    """Add a histogram of |x|, rounded to float32, by one half of its 32 bits: what a stream of tensors is counted by.

    Args:
        counts: int64, contiguous, on the device of x: (32768,) without `upper`, else (65536,).
        x: any shape, float32, bfloat16, float16 or float64.
        upper: None to count the upper 16 bits; else the lower 16 bits are counted, among the entries whose upper ones
            are `upper`.
        backend: "auto", "torch", "cpu" or "cuda" (which takes no `minus`).
        minus: None, or a tensor of x's shape and of any of its dtypes: |x - minus| is counted, the difference computed in
            float64 if either is float64, else in float32.

    Returns:
        counts itself.

    Raises:
        ShapeMismatchError: counts has another number of bins, minus another shape than x.
        ConfigError: a dtype or device that does not fit, `upper` out of range, an unknown backend.
        BackendError: the backend asked for cannot run this call.
    """
    bins = UPPER_BINS if upper is None else LOWER_BINS
    if counts.shape != (bins,):
        raise ShapeMismatchError(f"counts must be ({bins},) for upper={upper}, and is {tuple(counts.shape)}")
    if counts.dtype != torch.int64 or not counts.is_contiguous():
        raise ConfigError(f"counts must be contiguous int64, and is {counts.dtype} with strides {counts.stride()}")
    if minus is not None and minus.shape != x.shape:
        raise ShapeMismatchError(f"minus is {tuple(minus.shape)}, x is {tuple(x.shape)}")
    for name, tensor in [("x", x), *([] if minus is None else [("minus", minus)])]:
        check_dtype(name, tensor.dtype, STORED)
        check_device("counts", counts, name, tensor)
    if upper is not None and not 0 <= upper < UPPER_BINS:
        raise ConfigError(f"upper must be in [0, {UPPER_BINS}), and is {upper}")
    implementation = _dispatch.select(
        "select", IMPLEMENTATIONS, backend, x.device, counts, x, minus, self_check=(_self_check, x.dtype)
    )
    if x.numel():
        implementation.add_magnitude_histogram(counts, x, upper, minus)
    return counts


@accepts_dlpack
def kth_largest_magnitude(x: Tensor, k: int, backend: str = "auto") -> float:
    """The k-th largest |x|, rounded to float32: exact, in two passes over x and 1 MiB.

    Args:
        x: not empty, any shape, float32, bfloat16, float16 or float64. Infinities are the largest; NaN is an error.
        k: in [1, x.numel()]; 1 is the largest.
        backend: "auto", "torch", "cpu" or "cuda".

    Raises:
        ConfigError: x is empty, k is out of range, a dtype that does not fit, an unknown backend.
        NonFiniteWeightError: x holds NaN.
        BackendError: the backend asked for cannot run this call.
    """
    if not 1 <= k <= x.numel():
        raise ConfigError(f"k must be in [1, {x.numel()}], the number of entries of x {tuple(x.shape)}, and is {k}")

    def histogram(upper: int | None) -> Tensor:
        bins = UPPER_BINS if upper is None else LOWER_BINS
        return add_magnitude_histogram(torch.zeros(bins, dtype=torch.int64, device=x.device), x, upper, backend).cpu()

    counts = histogram(None)
    nans = int(counts[_INFINITY + 1 :].sum())
    if counts[_INFINITY]:
        nans += int(histogram(_INFINITY)[1:].sum())
    if nans:
        raise NonFiniteWeightError(
            f"{nans} of {x.numel()} entries are NaN, which has no place in an order of magnitudes"
        )
    upper, rank = find_rank(counts, x.numel() - k + 1)
    lower, _ = find_rank(histogram(upper), rank)
    return magnitude(upper, lower)


def find_rank(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th smallest entry (1-based), and that entry's rank within the bin."""
    cumulative = counts.cumsum(0)
    if not 1 <= rank <= int(cumulative[-1]):
        raise ConfigError(f"rank must be in [1, {int(cumulative[-1])}], the number of entries, and is {rank}")
    index = int(torch.searchsorted(cumulative, rank))
    return index, rank - (int(cumulative[index - 1]) if index else 0)


def magnitude(upper: int, lower: int) -> float:
    """The float32 whose bits have these halves."""
    return float(torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32))


def _self_check(implementation: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Both histograms of values with many zeros, beside torch's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70_001, generator=generator).mul_(torch.rand(70_001, generator=generator) < 0.5).to(device, dtype)
    expected = torch.zeros(UPPER_BINS, dtype=torch.int64, device=device)
    reference.add_magnitude_histogram(expected, x, None)
    fullest = int(expected[1:].argmax()) + 1
    for upper, bins in ((None, UPPER_BINS), (0, LOWER_BINS), (fullest, LOWER_BINS)):
        got, expected = (torch.zeros(bins, dtype=torch.int64, device=device) for _ in range(2))
        implementation.add_magnitude_histogram(got, x, upper)
        reference.add_magnitude_histogram(expected, x, upper)
        if not torch.equal(got, expected):
            return f"its counts of {dtype} differ from torch's in {int((got != expected).sum())} bins of {bins}"
    return None

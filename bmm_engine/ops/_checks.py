"""Checks of arguments that several ops make, in the same words."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, ShapeMismatchError

# What weights and rows may be stored in, and what may be summed in.
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SUMMED = (torch.float32, torch.float64)


def check_dtype(name: str, dtype: torch.dtype, allowed: Collection[torch.dtype]) -> None:
    """Raises `ConfigError` unless the dtype is one of several that are allowed."""
    if dtype not in allowed:
        *others, last = (str(one).removeprefix("torch.") for one in allowed)
        raise ConfigError(f"{name} must be {', '.join(others)} or {last}, not {dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises `ConfigError` unless both are on one device."""
    if tensor.device != other.device:
        raise ConfigError(f"{name} is on {tensor.device}, {other_name} on {other.device}; move one of them")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises `ShapeMismatchError` or `ConfigError` unless both have one shape, on one device."""
    if tensor.shape != other.shape:
        raise ShapeMismatchError(f"{name} is {tuple(tensor.shape)}, {other_name} is {tuple(other.shape)}")
    check_device(name, tensor, other_name, other)


def check_square(name: str, matrix: Tensor) -> None:
    """Raises `ShapeMismatchError` unless it is a square matrix, or a batch of them."""
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ShapeMismatchError(f"{name} must be (..., in, in), and is {tuple(matrix.shape)}")


def check_amount(name: str, value: float) -> None:
    """Raises `ConfigError` unless the number is finite and not negative."""
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name} must be finite and >= 0, and is {value}")


def result_dtype(
    out_dtype: torch.dtype | None, out: Tensor | None, allowed: Collection[torch.dtype], inputs: Iterable[Tensor]
) -> torch.dtype:
    """The dtype of a result: that of `out`, else `out_dtype`, else float64 where an input is, else float32. Raises
    `ConfigError` where the first two contradict each other, or `out_dtype` is not allowed."""
    if out is not None:
        if out_dtype not in (None, out.dtype):
            raise ConfigError(f"out_dtype is {out_dtype}, but out is {out.dtype}; give one of them")
        return out.dtype
    if out_dtype is not None:
        check_dtype("out_dtype", out_dtype, allowed)
        return out_dtype
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in inputs) else torch.float32

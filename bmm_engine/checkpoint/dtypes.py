"""Dtypes of tensors: those that a checkpoint is written in, and the one that is computed in."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bmm_engine.errors import ConfigError


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """float32, float16, bfloat16 or float64, by name or as torch's object; None stays None. Raises `ConfigError`."""
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ConfigError(f"dtype must be float32, bfloat16, float16 or float64, not {dtype!r}.")
    return found


def float_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype to compute in: float64 if any tensor is, else float32."""
    return torch.float64 if torch.float64 in set(dtypes) else torch.float32

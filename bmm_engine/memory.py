"""Give freed memory back to the system, so that a merge's resident size is what it holds and not what it once held."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _malloc_trim() -> Any:
    """glibc's malloc_trim, or None with another C library, which then keeps or returns memory as it sees fit."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


def release_free_memory() -> None:
    """Return free pages of the heap. Blocks of up to 32 MiB are kept there by glibc, and pile up between modules of unlike shapes."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)

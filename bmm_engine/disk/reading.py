"""What holds for every file that is read: what a path leads to, told without opening it, and JSON that says each thing once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from typing import Any

from bmm_engine.errors import shown

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def irregular(status: os.stat_result) -> str | None:
    """What it is that is no regular file; None for one. A pipe would be waited for if it were opened, and a device need not end."""
    return None if stat.S_ISREG(status.st_mode) else _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")


def unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object whose keys differ (readers would not agree which one counts), and are text. Raises `ValueError` with the key."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        key.encode("utf-8")  # a lone surrogate could not be written again
        if key in found:
            raise ValueError(f"the key {shown(key)} is there twice")
        found[key] = value
    return found

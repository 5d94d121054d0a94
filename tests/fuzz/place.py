"""What may lie in the place of a file: nothing, a folder, a pipe, a link that leads nowhere or everywhere."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path


def displace(rng: random.Random, path: Path) -> str:
    """Put something else where the file is; what it was."""
    outside = path.parent.parent / f"outside-{path.name}"
    kind = rng.choice(
        (
            "nothing",
            "folder",
            "pipe",
            "loop",
            "dangling",
            "outside",
            "zero",
            "full",
            "random",
            "socket",
            "unreadable",
            "empty",
        )
    )
    if kind not in ("outside", "unreadable"):
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "outside":
        shutil.move(path, outside)
        path.symlink_to(outside)
    elif kind in ("zero", "full", "random"):
        path.symlink_to(f"/dev/{kind}")
    elif kind == "socket":
        _socket_at(path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "unreadable":
        path.chmod(0)
    return f"{path.name} is {kind}"


def _socket_at(path: Path) -> None:
    import socket

    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)

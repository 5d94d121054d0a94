"""Jobs for processes of their own, which find them by their name."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bmm_engine.progress import track


def leave(path: Path, seconds: float) -> None:
    time.sleep(seconds)
    path.touch()


def die_on_the_way(label: str) -> None:
    for step in track(range(3), label, show=False):
        time.sleep(0.4)
        if step == 1:
            os._exit(1)


def fail_on_the_way(label: str) -> None:
    for step in track(range(3), label, show=False):
        time.sleep(0.4)
        if step == 1:
            raise ZeroDivisionError

"""Killed at any file event, a merge, or a search, is made by the same command run again: the same bytes, and nothing left beside them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("BMM_KILLS", "1"))
# Moments of each, a little fewer than there are.
MOMENTS = {"plain": 48, "overwriting": 80, "continual": 120, "sequential": 200, "correcting": 320, "searching": 320}


@pytest.mark.timeout(300 + 60 * KILLS)
def test_killed_at_file_events_the_same_command_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """At all events where BMM_KILLS is 100 or more, else at three of each; each repetition is killed too, and repeated."""
    rng = random.Random(KILLS)
    scenarios = []
    for name, moments in MOMENTS.items():
        events = [] if KILLS >= 100 else rng.sample(range(moments), 3)
        scenarios.append(",".join([f"tests.killed:{name}", *map(str, events)]))
    command = [sys.executable, "-m", "tests.kills", str(tmp_path), *scenarios]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200 + 60 * KILLS)
    assert done.returncode == 0, done.stdout + done.stderr

"""A process with two workers that sleep, ended from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PATIENCE_S = 60


def end_by(sent: signal.Signals, script: str, folder: Path, *arguments: str) -> tuple[int, str]:
    """Runs the script, sends it a signal once its workers sleep, and returns its exit code and what it printed to stderr.

    The script's workers report to `folder / "pids"`. SIGINT goes to all of them, as Ctrl-C does. Raises AssertionError where a process of its
    family is left.
    """
    path, pids = folder / "script.py", folder / "pids"
    path.write_text(script)
    pids.mkdir()
    with subprocess.Popen(
        [sys.executable, str(path), *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal's
    ) as parent:
        try:
            _until(lambda: len(list(pids.iterdir())) == 2 or parent.poll() is not None)
            family = psutil.Process(parent.pid).children(recursive=True)
            assert {int(path.name) for path in pids.iterdir()} <= {process.pid for process in family}
            assert len(family) >= 2
            if sent == signal.SIGINT:
                os.killpg(parent.pid, sent)
            else:
                os.kill(parent.pid, sent)
            _, printed = parent.communicate(timeout=PATIENCE_S)
        finally:
            parent.kill()
    _until(lambda: not any(_runs(process) for process in family))
    return parent.returncode, printed


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

"""No worker outlives the process it works for, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import signal
import sys
from bmm_engine.executors import open_executor
from tests.executors import jobs

if __name__ == "__main__":
    folder, how = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C, and so would what it starts
    executor = open_executor(2, folder=folder + "/shared")
    import torch
    shared = executor.share({"a": torch.ones(3)})
    executor.start(jobs.no_state)
    for job in range(2):
        executor.submit(job, jobs.report_and_sleep, folder + "/pids")
    if how == "closed":
        with executor:
            executor.wait()
    else:
        executor.wait()
"""


@pytest.mark.parametrize(
    ("how", "sent", "code"),
    [
        pytest.param("closed", signal.SIGINT, -signal.SIGINT, id="ctrl-c"),
        pytest.param("open", signal.SIGINT, -signal.SIGINT, id="ctrl-c, never closed"),
        pytest.param("open", signal.SIGKILL, -signal.SIGKILL, id="killed"),
    ],
)
def test_no_process_is_left(tmp_path, how, sent, code):
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    pids.mkdir()
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), how],
        env={**os.environ, "PYTHONPATH": root},
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
                os.killpg(parent.pid, sent)  # Ctrl-C goes to all of them
            else:
                os.kill(parent.pid, sent)
            _, printed = parent.communicate(timeout=30)
        finally:
            parent.kill()
    assert parent.returncode == code
    _until(lambda: not any(_runs(process) for process in family))
    if sent == signal.SIGINT:
        # One traceback, the parent's: workers leave it to the parent what Ctrl-C means.
        assert printed.count("KeyboardInterrupt") == 1
        assert not list((tmp_path / "shared").iterdir())


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

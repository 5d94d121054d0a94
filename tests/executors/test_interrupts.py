"""No worker outlives the process it works for, however that ends."""

from __future__ import annotations

import signal

import pytest

from tests.executors.ended import end_by

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
    ended, printed = end_by(sent, SCRIPT, tmp_path, str(tmp_path), how)
    assert ended == code
    if sent == signal.SIGINT:
        # One traceback, the parent's: workers leave it to the parent what Ctrl-C means.
        assert printed.count("KeyboardInterrupt") == 1
        assert not list((tmp_path / "shared").iterdir())

"""What a command takes from its start to its end, measured by a launcher that is itself next to nothing.

The kernel's high-water mark of a process counts the memory of whoever started it, up to the exec: a parent that holds torch or a checkpoint would
be counted as its child's. So the child is started and timed by this file, run as a script without site-packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.01


@dataclass(frozen=True)
class Usage:
    """`peak_mib`: all that was resident at once, pages of mapped files included; `private_mib`: without those, sampled every 10 ms."""

    seconds: float
    peak_mib: float
    private_mib: float
    status: int


def run(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Usage:
    """Run `command` to its end, its output into `log`. Raises AssertionError with the last lines of it when it fails: it did not do the work."""
    launcher = [sys.executable, "-I", "-S", __file__, str(log), *command]
    told = subprocess.run(launcher, check=True, capture_output=True, text=True, env={**os.environ, **(env or {})})
    usage = Usage(**json.loads(told.stdout))
    if usage.status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise AssertionError(f"{command[0]} ended with status {usage.status}:\n{tail}")
    return usage


def _measure(log: str, command: Sequence[str]) -> Usage:
    private_kib = 0
    ended = threading.Event()

    def watch(pid: int) -> None:
        nonlocal private_kib
        while not ended.wait(SAMPLE_S):
            try:
                with open(f"/proc/{pid}/status") as status:
                    private_kib = max(private_kib, *(int(line.split()[1]) for line in status if "RssAnon" in line), 0)
            except OSError:
                return

    with open(log, "wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        watcher = threading.Thread(target=watch, args=(process.pid,))
        watcher.start()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)  # reaped above; Popen need not wait again
    return Usage(seconds, used.ru_maxrss / 1024, private_kib / 1024, process.returncode)


if __name__ == "__main__":
    print(json.dumps(vars(_measure(sys.argv[1], sys.argv[2:]))))

"""The command's own entry in a forked child: a warm process makes a case cost milliseconds, and a case cannot hurt the next one."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from tests.fuzz.case import Ended

MEMORY_LIMIT = 2 * 2**30
_ADDRESS_SPACE = 3 * 2**30  # beyond what the parent has mapped: an allocation that would hurt the machine fails
_PAGE = resource.getpagesize()


def start(argv: list[str], folder: Path, alarm_s: float) -> tuple[int, float]:
    """Fork a child that runs `bmm argv` in `folder` and writes what it prints to `stdout` and `stderr` there; its pid, and when it began."""
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks of a process with threads: this one keeps to one
        pid = os.fork()
    if pid:
        return pid, began
    code = 1
    try:
        code = _run(argv, folder, alarm_s)
    finally:
        os._exit(code)


def wait() -> tuple[int, int, int]:
    """The next child that ends: its pid, its wait status, and its peak of resident memory in bytes."""
    pid, status, usage = os.wait4(-1, 0)
    return pid, status, usage.ru_maxrss * 1024


def ended(folder: Path, status: int, peak: int, seconds: float) -> Ended:
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    printed = [_text(folder / name) for name in ("stdout", "stderr")]
    return Ended(None if killed else os.WEXITSTATUS(status), killed, *printed, peak, seconds)


def _run(argv: list[str], folder: Path, alarm_s: float) -> int:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(target, descriptor)
    os.chdir(folder)
    # The default action ends the process even inside a system call or compiled code.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, alarm_s)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", encoding="utf-8"),
        os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace"),
    )
    warnings.resetwarnings()
    from bmm_engine.cli import main

    sys.argv = ["bmm", *argv]
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

"""The side of a worker: its state, and the loop of a worker process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from bmm_engine.executors.contract import WorkerInfo
from bmm_engine.executors.failures import Reply, attempt

if TYPE_CHECKING:
    from bmm_engine.executors.wire import Message, Received

# What keeps libraries on one thread; it must be said before they are loaded.
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

_PR_SET_PDEATHSIG = 1


class Host:
    """Holds a worker's state; calls give a `Reply`, never an exception."""

    def __init__(self, info: WorkerInfo):
        import torch

        torch.set_num_threads(1)
        self.info = info
        self.state: Any = None

    def prepare(self, setup: Callable[..., Any], args: tuple) -> Reply:
        self.state = None  # the old one makes room first
        reply = attempt(partial(setup, self.info, *args))
        self.state = reply.value
        return Reply(error=reply.error)

    def run(self, function: Callable[..., Any], args: tuple) -> Reply:
        return attempt(partial(function, self.state, *args))


def serve(connection: Connection, info: WorkerInfo, parent: int | None) -> None:
    """A worker process: says that it is up, then answers calls until the pipe closes. `parent`: whose death the kernel shall pass on."""
    # Ctrl-C goes to the whole group of processes. It is for the parent to judge; it held the signal back until here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    multiprocessing.current_process().daemon = (
        False  # as the parent sees it, it is one; here jobs may start processes of their own
    )
    _die_with(parent)
    from bmm_engine.executors.wire import encode, receive, send

    host = Host(info)
    send(connection, encode(Reply()))
    while True:
        try:
            received = receive(connection)
        except (EOFError, OSError):
            return

        # A call that cannot be read here, or a result that cannot be sent, is the job's failure too.
        answer = attempt(partial(_answer, host, received))
        del received
        try:
            send(connection, answer.value if answer.error is None else encode(answer))
        except OSError:
            return
        del answer  # not kept beside the next job's


def _answer(host: Host, received: Received) -> Message:
    from bmm_engine.executors.wire import encode

    method, function, args = received.decode()
    return encode(getattr(host, method)(function, args))


def _die_with(parent: int | None) -> None:
    """End when the parent ends, whatever runs here then."""
    watched = multiprocessing.parent_process()
    assert watched is not None
    threading.Thread(target=_exit_after, args=(watched.sentinel,), name="bmm-parent-watch", daemon=True).start()
    if parent is not None and sys.platform == "linux":
        # The thread above needs the interpreter's lock, which a long computation may hold; the kernel needs nothing.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before that
            os._exit(1)


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)

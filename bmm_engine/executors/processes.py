"""Workers as processes of this machine."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm_engine.errors import ConfigError
from bmm_engine.executors.contract import WorkerInfo
from bmm_engine.executors.failures import PackedError, Reply
from bmm_engine.executors.pool import Lost, Pool, Worker, cannot_send
from bmm_engine.executors.shared import MappedTensors, SharedFolder
from bmm_engine.executors.wire import Message, encode, receive, send
from bmm_engine.executors.worker import ONE_THREAD, serve

if TYPE_CHECKING:
    from torch import Tensor

# Not fork: a copy of a process whose libraries run threads has their locks, but not the threads that would release them.
START_METHODS = ("spawn", "forkserver")


class ProcessWorker(Worker):
    def __init__(self, info: WorkerInfo, start_method: str):
        super().__init__(info.index)
        context: Any = multiprocessing.get_context(start_method)
        self.connection, theirs = context.Pipe()
        # To the kernel, a process's parent is the thread that started it: its death means something only if it is the main one's.
        direct = start_method == "spawn" and threading.current_thread() is threading.main_thread()
        parent = os.getpid() if direct else None
        self.process = context.Process(
            target=serve, args=(theirs, info, parent), name=f"bmm-worker-{info.index}", daemon=True
        )
        try:
            with _one_thread_for_children(), _interrupts_held_back():
                self.process.start()
        except BaseException:  # a Ctrl-C that was held back comes here
            if self.process.pid is not None:
                self.bury()
            raise
        finally:
            theirs.close()

    @property
    def name(self) -> str:
        return f"process {self.index}"

    def ask(self, call: Message) -> None:
        with suppress(OSError):  # dead: its sentinel says so
            send(self.connection, call)

    def hear(self) -> Reply | Lost | None:
        """What it has said, if anything; that it is dead, once nothing it said is left."""
        try:
            if self.connection.poll():
                received = receive(self.connection)
            elif self.process.is_alive():
                return None
            else:
                return self.bury()
        except (EOFError, OSError):
            return self.bury()
        try:
            return received.decode()
        except Exception as error:  # whatever a class's own unpickling may raise
            return Reply(error=PackedError.of(error))

    def bury(self) -> Lost:
        """Kill what may be left of it."""
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self.process.close()
        self.connection.close()
        return Lost(_cause(code))


class ProcessExecutor(Pool):
    """Each worker is a process with one torch thread and a pipe; large tensors are mapped from a file in `folder`.

    No process outlives `close`, nor this process, however it ends.
    """

    def __init__(self, workers: int, *, start_method: str = "spawn", folder: Path | None = None):
        super().__init__(workers)
        if start_method not in START_METHODS:
            raise ConfigError(f"start_method is {start_method!r}; choose {' or '.join(START_METHODS)}.")
        self.start_method = start_method
        self._folder = SharedFolder(folder)
        atexit.register(self.close)  # of one that nobody closed

    def share(self, tensors: Mapping[str, Tensor]) -> MappedTensors:
        return self._folder.write(tensors)

    def pack(self, method: str, what: str, function: Callable[..., Any], args: tuple) -> Message:
        try:
            return encode((method, function, args))
        except Exception as error:  # pickle lets through whatever an object raises
            raise cannot_send(what, function, error) from error

    def spawn(self, info: WorkerInfo) -> ProcessWorker:
        return ProcessWorker(info, self.start_method)

    def poll(self, workers: list[Worker], timeout: float | None) -> list[tuple[Worker, Reply | Lost]]:
        by_object: dict[Any, ProcessWorker] = {}
        for worker in workers:
            assert isinstance(worker, ProcessWorker)
            by_object[worker.connection] = by_object[worker.process.sentinel] = worker
        ready = {by_object[found]: None for found in wait_for(list(by_object), timeout)}
        said = [(worker, worker.hear()) for worker in ready]
        return [(worker, event) for worker, event in said if event is not None]

    def close(self) -> None:
        workers = [worker for worker in self._alive() if isinstance(worker, ProcessWorker)]
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.bury()
            self._slots[worker.index] = None
        self._forget_all()
        self._folder.remove()
        atexit.unregister(self.close)


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"


@contextmanager
def _one_thread_for_children() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A child starts with Ctrl-C blocked, until it has said what to do about it."""
    resource_tracker.ensure_running()  # which would unblock it in between
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

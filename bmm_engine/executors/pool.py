"""Who runs what: jobs, the workers they are given to, and what happens when one dies. How a worker is reached is left to subclasses."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from bmm_engine.errors import ConfigError, WorkerLostError
from bmm_engine.executors.contract import Completed, Shared, WorkerInfo
from bmm_engine.executors.failures import Reply
from bmm_engine.executors.inline import check_idle, check_started

if TYPE_CHECKING:
    from torch import Tensor

P = TypeVar("P", bound="Pool")

# So many workers are given to one job, or to one setup, before it is held to be what kills them.
MOST_ATTEMPTS = 3


class Phase(Enum):
    STARTING = "starting"
    PREPARING = "making their state"
    IDLE = "idle"
    BUSY = "running a job"


@dataclass(eq=False)
class Job:
    name: Hashable
    call: Any  # as the subclass packed it
    attempts: int = 0
    cancelled: bool = False


@dataclass(frozen=True)
class Lost:
    """A worker is dead; `cause` says what of."""

    cause: str


class Worker(ABC):
    """One worker, as the pool sees it. It says one `Reply` when it is up, and one to each call."""

    def __init__(self, index: int):
        self.index = index
        self.phase = Phase.STARTING
        self.setup = 0  # which setup its state is of; 0: none
        self.job: Job | None = None

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def ask(self, call: Any) -> None:
        """Have it make a call. Does not raise if it is dead: `Pool.poll` finds that out."""


class Pool(ABC):
    """An executor whose workers live elsewhere. They are started when jobs are waiting for them, up to `workers` of them."""

    def __init__(self, workers: int):
        self.workers = workers
        self._slots: list[Worker | None] = [None] * workers
        self._queue: deque[Job] = deque()
        self._completed: list[Completed] = []
        self._setup: Any = None
        self._setups = 0
        self._lost_unprepared = 0
        self._failure: BaseException | None = None

    # What a subclass supplies

    @abstractmethod
    def share(self, tensors: Mapping[str, Tensor]) -> Shared: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def pack(self, method: str, what: str, function: Callable[..., Any], args: tuple) -> Any:
        """A call of a `Host`'s method in the form in which it travels; `what` names it in the `ConfigError` for what cannot."""

    @abstractmethod
    def spawn(self, info: WorkerInfo) -> Worker: ...

    @abstractmethod
    def poll(self, workers: list[Worker], timeout: float | None) -> list[tuple[Worker, Reply | Lost]]:
        """What workers say, at least one thing unless `timeout` passes. It removes what is left of those that are lost."""

    # The executor

    def start(self, setup: Callable[..., Any], *args: Any) -> None:
        check_idle(len(self._queue) + sum(1 for worker in self._alive() if _wanted(worker)))
        self._setup = self.pack("prepare", "the setup of workers", setup, args)
        self._setups += 1
        self._lost_unprepared, self._failure = 0, None

    def submit(self, job: Hashable, function: Callable[..., Any], *args: Any) -> None:
        check_started(self._setup is not None, job)
        self._queue.append(Job(job, self.pack("run", f"job {job!r}", function, args)))
        self._dispatch()

    def wait(self, timeout: float | None = None) -> list[Completed]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._failure is not None:
                raise self._failure
            self._dispatch()
            if self._completed or not (self._queue or any(_wanted(worker) for worker in self._alive())):
                completed, self._completed = self._completed, []
                return completed
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            said = self.poll(self._alive(), left)
            for worker, event in said:
                if isinstance(event, Lost):
                    self._lost(worker, event)
                else:
                    self._heard(worker, event)
            if not said and left is not None and deadline is not None and time.monotonic() >= deadline:
                return []

    def cancel(self) -> None:
        self._queue.clear()
        self._completed.clear()
        for worker in self._alive():
            if worker.job is not None:
                worker.job.cancelled = True

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Giving work

    def _alive(self) -> list[Worker]:
        return [worker for worker in self._slots if worker is not None]

    def _dispatch(self) -> None:
        """Give waiting jobs to workers that are ready, and see to it that as many as can be used are being made ready."""
        if self._failure is not None:
            return
        for worker in self._alive():
            if worker.phase is Phase.IDLE and worker.setup == self._setups and self._queue:
                worker.job = self._queue.popleft()
                worker.phase = Phase.BUSY
                worker.ask(worker.job.call)
        coming = sum(worker.phase in (Phase.STARTING, Phase.PREPARING) for worker in self._alive())
        for index, slot in enumerate(self._slots):
            if coming >= len(self._queue):
                return
            if slot is None:
                self._slots[index] = self.spawn(WorkerInfo(index, self.workers))
                coming += 1
            elif slot.phase is Phase.IDLE:
                self._prepare(slot)
                coming += 1

    def _prepare(self, worker: Worker) -> None:
        worker.phase, worker.setup = Phase.PREPARING, self._setups
        worker.ask(self._setup)

    # Hearing of it

    def _heard(self, worker: Worker, reply: Reply) -> None:
        phase, worker.phase = worker.phase, Phase.IDLE
        error = None if reply.error is None else reply.error.unpack()
        if phase is Phase.BUSY:
            job, worker.job = worker.job, None
            assert job is not None
            if not job.cancelled:
                self._completed.append(Completed(job.name, reply.value, error, worker.name))
        elif error is not None:
            current = phase is Phase.STARTING or worker.setup == self._setups
            worker.setup = 0
            if current:
                self._fail(error)
        elif phase is Phase.STARTING:
            self._prepare(worker)
        else:
            self._lost_unprepared = 0

    def _lost(self, worker: Worker, event: Lost) -> None:
        self._slots[worker.index] = None
        if worker.phase is Phase.BUSY:
            job = worker.job
            assert job is not None
            job.attempts += 1
            if job.cancelled:
                return
            if job.attempts < MOST_ATTEMPTS:
                self._queue.appendleft(job)
                return
            lost = _lost_error(f"job {job.name!r}", job.name, job.attempts, event.cause)
            self._completed.append(Completed(job.name, error=lost, worker=worker.name))
        elif worker.phase is not Phase.IDLE:
            self._lost_unprepared += 1
            if self._lost_unprepared >= MOST_ATTEMPTS:
                what = f"workers die while {worker.phase.value}"
                self._fail(_lost_error(what, None, self._lost_unprepared, event.cause))

    def _fail(self, error: BaseException) -> None:
        """Jobs cannot be run until there is another setup."""
        self.cancel()
        self._failure = error

    def _forget_all(self) -> None:
        """Of `close`: nothing is in flight any more, and nothing can be submitted."""
        self._slots = [None] * self.workers
        self._queue.clear()
        self._completed.clear()
        self._setup = None


def _wanted(worker: Worker) -> bool:
    return worker.job is not None and not worker.job.cancelled


def _lost_error(what: str, job: Hashable, attempts: int, cause: str) -> WorkerLostError:
    return WorkerLostError(
        f"{what}: {attempts} workers were lost, the last one with {cause}; what they printed may say why. If memory is short, use fewer workers.",
        job=job,
        attempts=attempts,
        cause=cause,
    )


def cannot_send(what: str, function: Callable[..., Any], error: BaseException) -> ConfigError:
    name = getattr(function, "__qualname__", repr(function))
    return ConfigError(
        f"{what} ({name}) cannot be sent to a worker: {error}. Functions must be importable from a module, and values picklable; or use no workers."
    )

"""Jobs in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bmm_engine.errors import ConfigError
from bmm_engine.executors.contract import Completed, WorkerInfo

if TYPE_CHECKING:
    from torch import Tensor

_NO_STATE = object()


@dataclass(frozen=True)
class HeldTensors:
    held: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.held)


class InlineExecutor:
    """One worker, this process: `wait` runs one job to its end, whatever its timeout, on all of torch's threads."""

    workers = 1

    def __init__(self) -> None:
        self._setup: Callable[[], Any] | None = None
        self._state: Any = _NO_STATE
        self._queue: deque[tuple[Hashable, Callable[[Any], Any]]] = deque()

    def share(self, tensors: Mapping[str, Tensor]) -> HeldTensors:
        return HeldTensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    def start(self, setup: Callable[..., Any], *args: Any) -> None:
        check_idle(len(self._queue))
        self._setup, self._state = partial(setup, WorkerInfo(0, 1), *args), _NO_STATE

    def submit(self, job: Hashable, function: Callable[..., Any], *args: Any) -> None:
        check_started(self._setup is not None, job)
        self._queue.append((job, lambda state: function(state, *args)))

    def wait(self, timeout: float | None = None) -> list[Completed]:
        if not self._queue:
            return []
        if self._state is _NO_STATE:
            assert self._setup is not None
            try:
                self._state = self._setup()
            except BaseException:
                self.cancel()
                raise
        job, call = self._queue.popleft()
        try:
            return [Completed(job, call(self._state), worker="inline")]
        except Exception as error:
            return [Completed(job, error=error, worker="inline")]

    def cancel(self) -> None:
        self._queue.clear()

    def close(self) -> None:
        self.cancel()
        self._setup, self._state = None, _NO_STATE

    def __enter__(self) -> InlineExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_idle(in_flight: int) -> None:
    if in_flight:
        raise ConfigError(
            f"start: {in_flight} jobs are in flight; wait for them or cancel() before workers get another state."
        )


def check_started(started: bool, job: Hashable) -> None:
    if not started:
        raise ConfigError(f"submit: job {job!r} has no worker, since start() was not called, or close() was.")

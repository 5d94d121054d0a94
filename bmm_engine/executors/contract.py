"""What an executor is: workers that make a state once and run jobs in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bmm_engine.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WorkerInfo:
    """Which worker a state is made for: `index` is 0-based and less than `workers`; a worker that replaces a dead one has its index."""

    index: int
    workers: int

    def device(self, device: str) -> str:
        """Where this worker computes: "cuda" becomes one of the CUDA devices that it sees, in turns; anything else stays as it is.

        Raises `ConfigError` where the worker sees no CUDA device.
        """
        if device != "cuda":
            return device
        import torch

        count = torch.cuda.device_count()
        if count == 0:
            raise ConfigError(
                f"device 'cuda': worker {self.index} of {self.workers} sees no CUDA device; set device to 'cpu'."
            )
        return f"cuda:{self.index % count}"


class Shared(Protocol):
    """Tensors that all workers read. What travels to a worker is a handle, not the data; pass it as an argument of its own."""

    def tensors(self) -> dict[str, Tensor]:
        """By name: contiguous, on the CPU, shapes and dtypes as they were given. To be read only: others may read the same memory."""


@dataclass(frozen=True)
class Completed:
    """One job that is over. `error`: what the function raised, or `WorkerLostError` where the job killed too many workers."""

    job: Hashable
    result: Any = None
    error: BaseException | None = None
    worker: str = ""


class Executor(Protocol):
    """Runs `function(state, *args)` in workers. Made for one thread; close it when done, best as a context manager.

    Functions and values that travel between processes must be importable and picklable. Nothing says which worker runs a job, and a job whose
    worker dies is run again: results must not depend on the worker, and effects outside it must bear repetition.
    """

    workers: int

    def share(self, tensors: Mapping[str, Tensor]) -> Shared:
        """Give all workers large tensors to read, once. Raises `OutputWriteError` where there is no room for them."""

    def start(self, setup: Callable[..., Any], *args: Any) -> None:
        """Have each worker make its state, `setup(WorkerInfo, *args)`, before its next job; called again, a new one.

        What `setup` raises is raised by `wait`, and all jobs are cancelled. Raises `ConfigError` while jobs are in flight, and for what
        cannot be sent to a worker.
        """

    def submit(self, job: Hashable, function: Callable[..., Any], *args: Any) -> None:
        """Queue `function(state, *args)`; `job` is its name in what `wait` returns. Raises `ConfigError` before `start`."""

    def wait(self, timeout: float | None = None) -> list[Completed]:
        """Jobs that are over, in the order of completion: at least one, unless `timeout` (in seconds) passes or nothing is in flight.

        Raises what `setup` raised, and `WorkerLostError` where workers die before they are ready.
        """

    def cancel(self) -> None:
        """Drop the jobs that wait, and the results of those that run, which workers finish before they take up others."""

    def close(self) -> None:
        """Kill what still runs, and remove what was shared. May be called again."""

    def __enter__(self) -> Executor: ...

    def __exit__(self, *_: object) -> None: ...

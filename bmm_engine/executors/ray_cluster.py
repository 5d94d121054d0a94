"""Workers as actors of a Ray cluster."""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bmm_engine.errors import ConfigError, OutputWriteError
from bmm_engine.executors.contract import WorkerInfo
from bmm_engine.executors.failures import PackedError, Reply
from bmm_engine.executors.pool import Lost, Pool, Worker, cannot_send
from bmm_engine.executors.worker import Host

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOCAL = "local"
CONNECT_S = 10


@dataclass(frozen=True)
class StoredTensors:
    """Tensors in Ray's object store; `store` is a reference to their bytes, of which there is one copy on each machine."""

    store: Any
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    def tensors(self) -> dict[str, Tensor]:
        import ray

        from bmm_engine.executors.wire import tensor_of

        arrays = ray.get(self.store)
        with warnings.catch_warnings():
            # The store's memory is not writable, nor is it to be written.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return {name: tensor_of(arrays[name], dtype, shape) for name, (dtype, shape) in self.layout.items()}


class Actor:
    """A worker's side on a cluster."""

    def __init__(self, info: WorkerInfo):
        self.host = Host(info)

    def hello(self) -> Reply:
        return Reply()

    def call(self, method: str, call: tuple[Callable[..., Any], tuple]) -> Reply:
        return getattr(self.host, method)(*call)


class RayWorker(Worker):
    def __init__(self, index: int, actor: Any):
        super().__init__(index)
        self.actor = actor
        self.answer: Any = actor.hello.remote()  # None while it is idle

    @property
    def name(self) -> str:
        return f"ray {self.index}"

    def ask(self, call: Any) -> None:
        self.answer = call(self.actor)

    def hear(self) -> Reply | Lost:
        """What it answered; waits for it."""
        import ray
        from ray import exceptions

        answer, self.answer = self.answer, None
        try:
            return ray.get(answer)
        except (
            exceptions.RayActorError,
            exceptions.WorkerCrashedError,
            exceptions.OutOfMemoryError,
            exceptions.ObjectLostError,
        ) as error:
            ray.kill(self.actor)  # it may be its answer only that is lost
            return Lost(f"{type(error).__name__} ({str(error).splitlines()[0]})")
        except exceptions.RayTaskError as error:  # a call that cannot be read there, or an answer that cannot be sent
            return Reply(error=PackedError.of(error.cause if isinstance(error.cause, BaseException) else error))
        except Exception as error:  # an answer that cannot be read here
            return Reply(error=PackedError.of(error))


class RayExecutor(Pool):
    """Each worker is an actor with one core, one torch thread, and its share of the GPUs. `address`: "local" starts a cluster on this machine.

    The package must be installed on every machine of the cluster, and paths must mean the same there. Actors are never restarted by Ray: a
    dead one is replaced here, and its job given on. A worker for which the cluster has no free core waits until there is one. Raises
    `ConfigError` where no cluster answers.
    """

    def __init__(self, address: str, workers: int):
        super().__init__(workers)
        self._closed = False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        import ray

        self._started = not ray.is_initialized()
        if self._started:
            local: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False} if address == LOCAL else {}
            try:
                _check_listening(address)
                ray.init(address=address, log_to_driver=False, configure_logging=False, **local)
            except (OSError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"ray: no cluster answers at {address!r}: {error}; start one with `ray start --head`, or use 'local'."
                ) from error
        self._options = {
            "num_cpus": 1,
            "num_gpus": gpus_each(ray.cluster_resources().get("GPU", 0.0), workers),
            "max_restarts": 0,
        }
        self._actor_class = ray.remote(Actor)

    def share(self, tensors: Mapping[str, Tensor]) -> StoredTensors:
        import ray

        from bmm_engine.executors.wire import bytes_of

        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        arrays = {name: bytes_of(tensor) for name, tensor in own.items()}
        try:
            store = ray.put(arrays)
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
            raise OutputWriteError(
                f"ray: {len(own)} tensors do not fit into the object store: {error}; give it more memory, or use processes."
            ) from error
        return StoredTensors(store, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in own.items()})

    def pack(self, method: str, what: str, function: Callable[..., Any], args: tuple) -> Callable[[Any], Any]:
        import ray

        # Stored once, so that a setup travels once to each machine, and a job that is given again not again.
        try:
            stored = ray.put((function, args))
        except Exception as error:  # pickle lets through whatever an object raises
            raise cannot_send(what, function, error) from error
        return lambda actor: actor.call.remote(method, stored)

    def spawn(self, info: WorkerInfo) -> RayWorker:
        return RayWorker(info.index, self._actor_class.options(**self._options).remote(info))

    def poll(self, workers: list[Worker], timeout: float | None) -> list[tuple[Worker, Reply | Lost]]:
        import ray

        by_answer = {w.answer: w for w in workers if isinstance(w, RayWorker) and w.answer is not None}
        answers = list(by_answer)
        ray.wait(answers, num_returns=1, timeout=timeout)
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=0)
        return [(by_answer[answer], by_answer[answer].hear()) for answer in ready]

    def close(self) -> None:
        import ray

        if self._closed:
            return
        self._closed = True
        for worker in self._alive():
            assert isinstance(worker, RayWorker)
            ray.kill(worker.actor)
        self._forget_all()
        if self._started:
            ray.shutdown()


def _check_listening(address: str) -> None:
    """Raises `OSError` where nothing listens at "host:port" or "ray://host:port"; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


def gpus_each(gpus: float, workers: int) -> float:
    """The share of a GPU that each worker asks for, such that all find room: a worker is never spread over two."""
    whole = int(gpus)
    if whole == 0:
        return 0.0
    on_one = math.ceil(workers / whole)
    return math.floor(1e4 / on_one) / 1e4  # Ray counts in ten-thousandths

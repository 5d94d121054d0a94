"""What the tests' workers run. It imports little, since every worker imports it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from bmm_engine.errors import BmmError, NonFiniteGramError
from bmm_engine.executors import Shared, WorkerInfo


class TwoFaced(BmmError):
    """Makes its message of its argument: made again from its message, it would say it twice."""

    def __init__(self, count: int):
        super().__init__(f"{count} faces")


def no_state(info: WorkerInfo) -> None:
    return None


def keep_info(info: WorkerInfo, factor: int) -> tuple[WorkerInfo, int]:
    return info, factor


def keep_shared(info: WorkerInfo, shared: Shared) -> dict[str, torch.Tensor]:
    return shared.tensors()


def refuse(info: WorkerInfo, path: str) -> None:
    with open(path, "a") as file:
        file.write("x")
    raise NonFiniteGramError("no state for you", module="layer.0", count=3)


def die_in_setup(info: WorkerInfo, path: str) -> None:
    with open(path, "a") as file:
        file.write("x")
    os._exit(7)


def arithmetic(state: tuple[WorkerInfo, int], seed: int) -> dict[str, Any]:
    """Something of every kind: a product in float32, bfloat16, an empty tensor, a transposed one, plain values."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(40, 70, generator=generator), torch.randn(70, 30, generator=generator)
    product = a @ b * state[1]
    return {
        "product": product,
        "half": product.bfloat16(),
        "empty": product[:0],
        "transposed": product.T,
        "mask": product > 0,
        "scalar": product.sum(),
        "seed": seed,
    }


def info_of(state: Any) -> tuple[Any, int, dict[str, str | None], int]:
    """The state, torch's threads, the environment's, and the process."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return state, torch.get_num_threads(), {name: os.environ.get(name) for name in names}, os.getpid()


def square_later(state: Any, number: int, seconds: float) -> int:
    time.sleep(seconds)
    return number * number


def fail(state: Any, how: str) -> None:
    if how == "keywords":
        raise NonFiniteGramError("3 entries are not finite", module="layer.0", count=3)
    if how == "two faces":
        raise TwoFaced(2)
    if how == "os":
        open("/nowhere/to/be/found").close()
    if how == "decode":
        b"\xff".decode("utf-8")
    if how == "exit":
        raise SystemExit(4)

    class Local(Exception):
        pass

    raise Local("of a function's own")


def unsendable(state: Any) -> Any:
    return (number for number in range(3))


def sums(state: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Of shared tensors: dtype, shape, values as float64, and whether the data lies in a mapped file or Ray's store."""
    with open("/proc/self/maps") as file:
        lines = [line.split(maxsplit=5) for line in file]
    mapped = [line for line in lines if len(line) == 6 and (".shared-" in line[5] or "/plasma" in line[5])]
    areas = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]

    def inside(tensor: torch.Tensor) -> bool:
        return any(begin <= tensor.data_ptr() < end for begin, end in areas)

    return {k: (t.dtype, tuple(t.shape), t.double().tolist(), t.is_contiguous(), inside(t)) for k, t in state.items()}


def spoil(state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        tensor.zero_()


def die(state: Any, path: str, times: int) -> str:
    """Kill the worker the first `times` times; each attempt leaves a mark in the file at `path`."""
    with open(path, "a") as file:
        file.write("x")
    if Path(path).stat().st_size <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def report_and_sleep(state: Any, folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


def interrupt_itself(state: Any) -> str:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    return "unmoved"


def start_a_child(state: Any) -> int:
    """Jobs may use processes of their own, as a DataLoader does."""
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=os._exit, args=(5,))
    child.start()
    child.join()
    return child.exitcode or 0

"""Which backends a test runs on, and where: CPU tensors, or CUDA tensors under the mark `gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bmm_engine.ops import _native, _triton

needs_cpu = pytest.mark.skipif(_native.cpu_missing() is not None, reason=str(_native.cpu_missing()))
needs_two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than 2 CUDA devices")

# Without a device the kernels run in Triton's interpreter, a thousand times slower: on CPU tensors, at small shapes.
INTERPRETED = _triton.interpreted()
_MARKS = {
    "torch": [],
    "cpu": [needs_cpu],
    "cuda": [pytest.mark.gpu],
    "triton": [pytest.mark.skipif(_triton.missing() is not None, reason=str(_triton.missing()))]
    if INTERPRETED
    else [pytest.mark.gpu],
}


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" or (backend == "triton" and not INTERPRETED) else "cpu"


def each_backend(*backends: str) -> pytest.MarkDecorator:
    """Parametrises `backend`."""
    return pytest.mark.parametrize("backend", [pytest.param(name, marks=_MARKS[name]) for name in backends])


def each_backend_and(argument: str, values: dict[str, list]) -> pytest.MarkDecorator:
    """Parametrises `backend` and `argument`, given what each backend takes."""
    cases = [
        pytest.param(name, value, marks=_MARKS[name], id=f"{name}-{value}") for name in values for value in values[name]
    ]
    return pytest.mark.parametrize(("backend", argument), cases)


def each_gpu_backend(*backends: str) -> pytest.MarkDecorator:
    """Parametrises `backend`, for tests of what only a device has."""
    return pytest.mark.parametrize("backend", [pytest.param(name, marks=pytest.mark.gpu) for name in backends])


def fill_late(tensor: Tensor, values: Tensor) -> None:
    """On the current stream: waits a while (about 0.1 s), then copies `values`."""
    torch.cuda._sleep(200_000_000)
    tensor.copy_(values)

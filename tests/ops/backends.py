"""Which backends a test runs on, and where: CPU tensors, or CUDA tensors under the mark `gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bmm_engine.ops import _native, _triton
from tests.numerics import ALLOWED_EPS, ALLOWED_FACTOR, assert_as_good_as_torch

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


# What a product may lose, relative to the product of the magnitudes: the factors' rounding errors, to 11 bits in TF32.
_LOST = {"tf32x3": 2.0**-20, "tf32": 2.0**-9.9}


def assert_as_precise(got: Tensor, same_dtype: Tensor, truth: Tensor, magnitude: Tensor, precision: str) -> None:
    """`got` errs no more than `precision` allows; `magnitude` is `truth` with every factor's absolute value."""
    if precision == "ieee" or got.device.type == "cpu":
        assert_as_good_as_torch(got, same_dtype, truth)
        return
    error, torch_error = ((tensor.double() - truth).abs().max().item() for tensor in (got, same_dtype))
    rounding = ALLOWED_EPS * torch.finfo(got.dtype).eps * truth.abs().max().item()
    limit = ALLOWED_FACTOR * torch_error + rounding + _LOST[precision] * magnitude.max().item()
    assert error <= limit, f"error {error:.3e} > {limit:.3e} with {precision} (torch: {torch_error:.3e})"


def fill_late(tensor: Tensor, values: Tensor) -> None:
    """On the current stream: waits a while (about 0.1 s), then copies `values`."""
    torch.cuda._sleep(200_000_000)
    tensor.copy_(values)

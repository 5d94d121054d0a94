"""The only importer of the compiled modules `_cpu` and `_cuda`; records why one is absent or does not load."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# The codes of csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# (address, rows, columns, row stride, column stride, dtype code): a matrix, as csrc/common/view.h takes it.
Matrix = tuple[int, int, int, int, int, int]

_REMEDY = {
    "_cpu": "install bmm-engine with a C++ compiler at hand (`pip install .`)",
    "_cuda": "install bmm-engine with nvcc at hand (`pip install . -Ccmake.define.BMM_CUDA=ON`)",
}


def matrix(tensor: Tensor | None) -> Matrix:
    """A 2-D tensor of any strides for the native code, which does not keep it alive; zeros for none."""
    if tensor is None:
        return (0, 0, 0, 0, 0, 0)
    return (tensor.data_ptr(), *tensor.shape, *tensor.stride(), DTYPE_CODES[tensor.dtype])


def elements(tensor: Tensor | None) -> tuple[int, int]:
    """(address, dtype code) of a contiguous tensor for the native code, which does not keep it alive."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPE_CODES[tensor.dtype])


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """The compiled module, or None and why; tried once per process."""
    full_name = f"bmm_engine.{name}"
    try:
        return importlib.import_module(full_name), None
    except ModuleNotFoundError:
        reason = f"{full_name} is not built; {_REMEDY[name]}"
        # Without the CPU kernels everything works on torch, only slower: that is said. CUDA is optional.
        logger.log(logging.WARNING if name == "_cpu" else logging.INFO, "%s; running on torch until then", reason)
    except ImportError as error:
        reason = f"{full_name} is built but does not load: {error}"
        logger.warning(reason)
    return None, reason


def cpu_missing() -> str | None:
    """None when `_cpu` can be used, else why not."""
    return _load("_cpu")[1]


@cache
def cuda_missing() -> str | None:
    """None when `_cuda` can be used on this machine, else why not (not built, does not load, no driver)."""
    module, reason = _load("_cuda")
    if module is None:
        return reason
    unavailable: str = module.unavailable()
    return f"bmm_engine._cuda finds no usable device: {unavailable}" if unavailable else None


def cpu() -> ModuleType:
    """The module `_cpu`. Call it only when `cpu_missing()` is None."""
    module, reason = _load("_cpu")
    assert module is not None, reason
    return module


def cuda() -> ModuleType:
    """The module `_cuda`. Call it only when `cuda_missing()` is None."""
    module, reason = _load("_cuda")
    assert module is not None, reason
    return module

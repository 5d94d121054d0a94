"""Whether Triton can be used, and its kernels as implementations that import it only when they are called."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

ENVIRONMENT = "TRITON_INTERPRET"

# Below this compute capability there are no bfloat16 and TF32 tensor cores.
_LEAST_CAPABILITY = (8, 0)

_BITS, _DOUBLE = struct.Struct("d"), struct.Struct("q")


@cache
def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors. Triton decides when a kernel is defined: once."""
    return os.environ.get(ENVIRONMENT, "").lower() in ("1", "true", "yes", "on", "y")


@cache
def missing() -> str | None:
    """None when Triton can be used in this process, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install 'bmm-engine[triton]'`"
    if not interpreted() and not torch.cuda.is_available():
        return f"torch sees no CUDA device; set {ENVIRONMENT}=1 before the first use to run the kernels interpreted"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises whatever it likes
        return f"triton is installed but does not load: {error}"
    if interpreted():
        _let_the_interpreter_count()
    return None


def _let_the_interpreter_count() -> None:
    """Loops over run-time bounds under NumPy >= 2.4, which converts no array of shape (1,) to a number: what triton up
    to 3.6 takes scalars for (https://github.com/triton-lang/triton/issues/9171)."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None:
        return

    def patch_and_repair(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_repair  # type: ignore[attr-defined]


def describe() -> str:
    """For diagnostics. Call it only when `missing()` is None."""
    where = "interpreted, on CPU tensors" if interpreted() else "compiled, on CUDA tensors"
    return f"available, version {importlib.metadata.version('triton')}, {where}"


def unsupported_device(device: torch.device) -> str | None:
    """None when the kernels run on tensors of this device, else why not."""
    if interpreted():
        # Interpreted kernels would take CUDA tensors too, a thousand times slower than anything else.
        return None if device.type == "cpu" else f"{ENVIRONMENT} is set, which is for CPU tensors, not for {device}"
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device (CPU tensors need {ENVIRONMENT}=1)"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        return f"{device} has compute capability {capability}; the kernels need {_LEAST_CAPABILITY}"
    return None


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` current: Triton launches on the current stream of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; few under the interpreter, so that small shapes take the same paths as large ones."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


def table(values: Sequence[int | float], device: torch.device) -> Tensor:
    """Numbers for a kernel as int64 on the device: pointers, strides, and floats by the bits of their float64.

    Copied once per list of values, device and stream, without waiting for the device; a list that comes again (the same
    tensors in every step of a loop) is not copied again.
    """
    integers = [value if isinstance(value, int) else _DOUBLE.unpack(_BITS.pack(value))[0] for value in values]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    # Per stream, since only there is the copy known to come before the kernel, and the kernel before what reuses the
    # memory of a table that was dropped.
    return _table(tuple(integers), device, stream)


@lru_cache(maxsize=128)
def _table(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    # A pageable source: the driver has read it when the call returns.
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


class Tile(NamedTuple):
    """How a product is cut: `block` x `block` (or `block` x `columns`) of the result by `depth`, and the launch."""

    block: int
    depth: int
    # After this many terms the partial sum is added to the total in float32. Tensor cores cut off, rather than round,
    # what they add to an accumulator, so the error of one that runs through would grow with the number of terms.
    flush: int
    warps: int
    stages: int

    def launch(self, precision: str) -> dict[str, object]:
        """The constants of a kernel of a product, and the options of its launch."""
        return {
            "BLOCK": self.block,
            "DEPTH": self.depth,
            "FLUSH": self.flush,
            "PRECISION": precision,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# Small enough that tests on small shapes meet several tiles, splits and flushes.
INTERPRETED_TILE = Tile(block=32, depth=32, flush=64, warps=4, stages=1)


# What a program may have of a processor's shared memory on the smallest of the devices (compute capability 8.6, 8.9).
_SHARED_BYTES = 96 * 1024


def product_tile(rows: int, columns: int, bytes_loaded: int, precision: str, device: torch.device) -> Tile:
    """For a float32 product of this shape, whose factors together load so many bytes for each term of an entry.

    Chosen by arithmetic and the compiler's report (registers, shared memory); not tuned on hardware.
    """
    if interpreted():
        return INTERPRETED_TILE
    few = -(-rows // 128) * -(-columns // 128) < processors(device)  # 128-wide tiles would leave processors idle
    depth, flush = (16, 512) if precision == "ieee" else (32, 256)
    tiles = [Tile(128, depth, flush, 8, stages) for stages in (3, 2) if not few]
    tiles += [Tile(64, depth, flush, 4, stages) for stages in (3, 2)]
    # All stages but one are held in shared memory, and the float32 factors of the current one.
    fitting = [tile for tile in tiles if tile.block * depth * (bytes_loaded * (tile.stages - 1) + 8) <= _SHARED_BYTES]
    return (fitting or tiles[-1:])[0]


def element(dtype: torch.dtype) -> Any:
    """Triton's name of a floating-point dtype, for pointers in a table."""
    language = importlib.import_module("triton.language")
    return getattr(language, str(dtype).removeprefix("torch."))


def aligned(*tensors: Tensor) -> bool:
    """Whether the pointers are multiples of 16 bytes, which the compiler cannot see of pointers in a table."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


# Offsets within a tile are 32-bit, which costs half the registers, and a tile is up to 128 wide.
MOST_STRIDE = 2**23


def too_far(**tensors: Tensor | None) -> str | None:
    """None when every stride is one that the kernels of products can take, else what to say."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        matrix = zip(tensor.stride()[-2:], tensor.shape[-2:], strict=True)
        if any(stride > MOST_STRIDE for stride, size in matrix if size > 1):
            return f"{name} has strides {tensor.stride()}, and the kernels take up to {MOST_STRIDE}"
    return None


@cache
def _load(name: str) -> tuple[Any, str | None]:
    """A module of kernels, or None and why; tried once per process."""
    try:
        return importlib.import_module(name), None
    except Exception as error:  # a triton of another version, say
        return None, f"the kernels do not load with triton {importlib.metadata.version('triton')}: {error}"


class Kernels:
    """A module `triton_kernel` as an implementation in an op's table; imported, and triton with it, when first needed."""

    def __init__(self, name: str):
        self._name = name

    def supports(self, *call: Any) -> str | None:
        if reason := missing():
            return reason
        module, reason = _load(self._name)
        return reason or module.supports(*call)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by copy, pickle and the like, which want no kernels
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)

"""What the machine can do at most, measured now: fp32, fp64 and bf16 arithmetic, and copy bandwidth.

On the CPU the compiled probes say: multiply-adds on registers, and memcpy of 256 MiB per thread. On CUDA it is torch's own best: products of
8192 x 8192 without TF32, and a copy of 1 GiB.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal

import torch

from bench.report import Row, commit, hardware, note
from bench.timing import SETTLE_S
from bmm_engine.ops import _native

Kind = Literal["fp32", "fp64", "bf16", "copy"]

# kind: (probe of the compiled module, what it counts, its unit in TFLOP/s or GB/s)
_PROBES: dict[Kind, tuple[str, str, float]] = {
    "fp32": ("probe_f32_gflops", "fp32 fma", 1e-3),
    "fp64": ("probe_f64_gflops", "fp64 fma", 1e-3),
    "bf16": ("probe_bf16_gflops", "bf16 dot", 1e-3),
    "copy": ("probe_copy_gbytes_per_s", "copy, read + written", 1.0),
}
_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
_ORDER = 8192
_COPIED_BYTES = 1 << 30


@cache
def measured(device: torch.device, kind: Kind) -> float | None:
    """TFLOP/s, or GB/s of "copy"; None where the machine or the build has no way to tell."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _cuda(device, kind)
    if _native.cpu_missing():
        return None
    name, _, unit = _PROBES[kind]
    rates: list[float] = []
    for _ in range(3):
        time.sleep(SETTLE_S)
        rates.append(getattr(_native.cpu(), name)(torch.get_num_threads()))
    return max(rates) * unit or None  # 0: the machine lacks the instructions


def share(device: torch.device, kind: Kind, tflops: float, gbytes_per_s: float) -> float | None:
    """The part of the peak that was reached. Where a machine has no bf16 arithmetic, bf16 rows are held to the fp32 peak."""
    peak = measured(device, kind)
    if peak is None and kind == "bf16":
        peak = measured(device, "fp32")
    if peak is None:
        return None
    return (gbytes_per_s if kind == "copy" else tflops) / peak


def rows(device: torch.device) -> Iterator[Row]:
    for kind, (_, what, _) in _PROBES.items():
        rate = measured(device, kind)
        if rate is None:
            note(f"peak: {what} is not measured: {_native.cpu_missing() or 'the machine has no such instructions'}")
            continue
        cuda = device.type == "cuda"
        work = _COPIED_BYTES * 2e-9 if kind == "copy" else 2 * _ORDER**3 * 1e-12
        yield Row(
            op="peak",
            backend="torch" if cuda else "cpu",
            device=device.type,
            hardware=hardware(device),
            dtype="-" if kind == "copy" else str(_DTYPES[kind]).removeprefix("torch."),
            shape=what if not cuda or kind == "copy" else f"{kind}: torch.mm of {_ORDER}",
            rival="-",
            ours_ms=work / rate * 1e3 if cuda else None,
            ours_spread=None,
            rival_ms=None,
            rival_spread=None,
            ratio=None,
            tflops=None if kind == "copy" else rate,
            peak_share=None,
            gbytes_per_s=rate if kind == "copy" else None,
            peak_mib=None,
            error=None,
            rival_error=None,
            commit=commit(),
        )


def _cuda(device: torch.device, kind: Kind) -> float:
    if kind == "copy":
        source = torch.empty(_COPIED_BYTES, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return 2 * _COPIED_BYTES / _fastest(lambda: target.copy_(source)) * 1e-9
    a = torch.randn(_ORDER, _ORDER, device=device).to(_DTYPES[kind])
    out = torch.empty_like(a)
    return 2 * _ORDER**3 / _fastest(lambda: torch.mm(a, a, out=out)) * 1e-12


def _fastest(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e-3)
    return best

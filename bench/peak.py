"""What the machine can do at most, measured now: fp32 multiply-adds and copy bandwidth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from bmm_engine.ops import _native


@dataclass(frozen=True)
class Peak:
    fp32_tflops: float
    copy_gbytes_per_s: float  # read plus written


@cache
def measured(device: torch.device) -> Peak | None:
    """The peaks of a device; None on the CPU when the compiled probe is missing."""
    if device.type == "cuda":
        return _cuda(device)
    if _native.cpu_missing():
        return None
    threads = torch.get_num_threads()
    native = _native.cpu()
    return Peak(native.probe_fma_gflops(threads) * 1e-3, native.probe_copy_gbytes_per_s(threads))


def _cuda(device: torch.device) -> Peak:
    """By torch's own best: a large fp32 product without TF32, and a copy of 1 GiB."""
    n = 8192
    a = torch.randn(n, n, device=device)
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: a @ a)
    copy_seconds = _fastest(lambda: target.copy_(source))
    return Peak(2 * n**3 / seconds * 1e-12, 2 * 4 * 2**28 / copy_seconds * 1e-9)


def _fastest(work) -> float:
    best = float("inf")
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e-3)
    return best

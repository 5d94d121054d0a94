"""The clock: variants of one piece of work, timed in turns so that drift of the machine falls on all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

Work = Callable[[], object]

# A sample repeats the call until it lasts about this long, so that the clock's grain is small beside it.
SAMPLE_MS = {"cpu": 2.0, "cuda": 10.0}
MAX_CALLS = 64
# Where a round takes long there are fewer of them, so that a case takes about this long at most.
CASE_S, LEAST_ROUNDS = 30.0, 5
# torch's OpenMP workers spin for a millisecond or so after a parallel region, and keep a core from whatever runs next. This pause before every
# sample of every variant lets them go to sleep: none inherits its predecessor's spinning threads, and all wake their own.
SETTLE_S = 0.005
# Written between calls to push everything else out of a GPU's L2 (50 to 126 MB on what is sold today).
FLUSH_BYTES = 512 << 20


def interleaved(works: Sequence[Work], device: torch.device, rounds: int, *, cold: bool = False) -> list[list[float]]:
    """Samples of each of `works`, in milliseconds per call: `rounds` of them, or, of work that takes seconds, as few as LEAST_ROUNDS.

    They take turns, and each round starts with another one.

    On the CPU a sample is a pause (see SETTLE_S) and then calls back to back; caches stay as the previous variant left them.
    On CUDA a sample is calls back to back between two events, on a GPU that was idle: where the host cannot launch as fast as the GPU
    works, the launches count, as they do for users. With `cold` (memory-bound work) each call has events of its own, after the L2
    was overwritten and the GPU had become idle: one launch latency counts, and nothing is read from the L2.
    """
    once_ms = [sample(work, device, 1, cold=cold) for work in works]
    calls = [_calls(each_ms, device) for each_ms in once_ms]
    round_ms = sum(each_ms * count for each_ms, count in zip(once_ms, calls, strict=True))
    rounds = min(rounds, max(LEAST_ROUNDS, int(CASE_S * 1e3 / round_ms)))
    samples: list[list[float]] = [[] for _ in works]
    for turn in range(rounds):
        for position in range(len(works)):
            index = (turn + position) % len(works)
            samples[index].append(sample(works[index], device, calls[index], cold=cold))
    return samples


def sample(work: Work, device: torch.device, calls: int, *, cold: bool = False) -> float:
    """Milliseconds per call over one sample of `calls` calls."""
    if device.type == "cuda":
        return _cuda_sample(work, device, calls, cold=cold)
    time.sleep(SETTLE_S)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) * 1e3 / calls


def spread(samples: Sequence[float]) -> float:
    """Interquartile range over median."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / middle


def _calls(once_ms: float, device: torch.device) -> int:
    return max(1, min(MAX_CALLS, math.ceil(SAMPLE_MS[device.type] / once_ms)))


def _cuda_sample(work: Work, device: torch.device, calls: int, *, cold: bool) -> float:
    with torch.cuda.device(device):
        if not cold:
            torch.cuda.synchronize()
            return _between_events(work, calls) / calls
        total = 0.0
        for _ in range(calls):
            _flush_buffer(device).zero_()
            torch.cuda.synchronize()
            total += _between_events(work, 1)
        return total / calls


def _between_events(work: Work, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

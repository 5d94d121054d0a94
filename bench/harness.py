"""Correctness first, then time: ours and its rival in turns, medians and spread, one row per case."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bench import peak
from tests.numerics import assert_as_good_as_torch, relative_error


@dataclass(frozen=True)
class Row:
    """One measurement. Speeds and shares are of ours; `ratio` is rival_ms / ours_ms; `error` is relative to float64."""

    op: str
    backend: str
    device: str
    hardware: str
    dtype: str
    shape: str
    rival: str
    ours_ms: float
    ours_spread: float  # interquartile range / median
    rival_ms: float
    rival_spread: float
    ratio: float
    tflops: float
    peak_share: float | None
    gbytes_per_s: float
    peak_mib: float | None
    error: float
    commit: str


@dataclass(frozen=True)
class Case:
    """What one row compares.

    `ours` and `rival` do the same work in full; `check` reduces a result to what is compared with `truth`, in float64,
    and with `same_dtype`, plain torch in the dtype of the result. `limit` is the resource that bounds the op.
    """

    op: str
    backend: str
    device: torch.device
    dtype: torch.dtype
    shape: str
    rival_name: str
    ours: Callable[[], Tensor]
    rival: Callable[[], Tensor]
    check: Callable[[Tensor], Tensor]
    same_dtype: Tensor
    truth: Tensor
    flops: float
    bytes: float
    limit: str  # "compute" or "memory"


def measure(case: Case, rounds: int = 9) -> Row:
    """Assert that ours is right, then time both in turns. Raises AssertionError before any timing when it is not."""
    result = case.check(case.ours())
    assert_as_good_as_torch(result, case.same_dtype, case.truth)
    error = relative_error(result, case.truth)
    peak_mib = _peak_mib(case.ours, case.device)
    case.rival()
    ours, rival = [], []
    for _ in range(rounds):
        ours.append(_milliseconds(case.ours, case.device))
        rival.append(_milliseconds(case.rival, case.device))
    ours_ms, rival_ms = statistics.median(ours), statistics.median(rival)
    tflops, gbytes_per_s = case.flops / ours_ms * 1e-9, case.bytes / ours_ms * 1e-6
    limits = peak.measured(case.device)
    if limits is None:
        share = None
    elif case.limit == "compute":
        share = tflops / limits.fp32_tflops
    else:
        share = gbytes_per_s / limits.copy_gbytes_per_s
    return Row(
        op=case.op,
        backend=case.backend,
        device=case.device.type,
        hardware=hardware(case.device),
        dtype=str(case.dtype).removeprefix("torch."),
        shape=case.shape,
        rival=case.rival_name,
        ours_ms=ours_ms,
        ours_spread=_spread(ours),
        rival_ms=rival_ms,
        rival_spread=_spread(rival),
        ratio=rival_ms / ours_ms,
        tflops=tflops,
        peak_share=share,
        gbytes_per_s=gbytes_per_s,
        peak_mib=peak_mib,
        error=error,
        commit=commit(),
    )


def _milliseconds(work: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _spread(samples: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / middle


def _peak_mib(work: Callable[[], Tensor], device: torch.device) -> float | None:
    """Memory that one run takes beyond what was held before it; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before_mib = _status_mib("VmRSS")
        work()
        return max(0.0, _status_mib("VmHWM") - before_mib)
    except OSError:
        return None


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}")


@cache
def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


@cache
def commit() -> str:
    """The commit of the working tree, with a plus when it has changes; "unknown" outside a repository."""
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changes.stdout.strip() else "")


_COLUMNS = (
    "op",
    "backend",
    "dtype",
    "shape",
    "ours_ms",
    "rival",
    "rival_ms",
    "ratio",
    "peak_share",
    "peak_mib",
    "error",
)


def table(rows: Sequence[Row]) -> str:
    cells = [list(_COLUMNS)] + [[_cell(getattr(row, column)) for column in _COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """A JSON list of the rows, each with the versions it was measured with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    path.write_text(json.dumps([{**asdict(row), "versions": versions} for row in rows], indent=1) + "\n")

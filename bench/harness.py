"""Correctness first, then time: ours on each of its backends and all rivals in turns; one row per backend and rival."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import peak, timing
from bench.report import Row, commit, hardware, note
from bmm_engine.errors import BackendError
from bmm_engine.memory import release_free_memory
from bmm_engine.ops import _dispatch
from tests.numerics import assert_as_good_as_torch, assert_backward_stable, backward_error, relative_error


@dataclass(frozen=True)
class Gate:
    """Tells a right result from a wrong one.

    `part` takes of a result what is compared: a few rows and columns, so that the truth is cheap.
    """

    part: Callable[[Any], Tensor]
    assert_right: Callable[[Tensor], None]
    error: Callable[[Tensor], float]


def as_good_as_torch(part: Callable[[Any], Tensor], same_dtype: Tensor, truth: Tensor) -> Gate:
    """Beside `truth`, in float64, and `same_dtype`, plain torch in the dtype of the result."""
    return Gate(
        part, lambda got: assert_as_good_as_torch(got, same_dtype, truth), lambda got: relative_error(got, truth)
    )


def backward_stable(part: Callable[[Any], Tensor], A: Tensor, B: Tensor) -> Gate:
    """The part solves X A = B."""
    return Gate(part, lambda got: assert_backward_stable(got, A, B), lambda got: backward_error(got, A, B))


def exactly(part: Callable[[Any], Tensor], truth: Tensor) -> Gate:
    def assert_right(got: Tensor) -> None:
        assert torch.equal(got, truth), f"relative error {relative_error(got, truth):.3e}, and must be 0"

    return Gate(part, assert_right, lambda got: relative_error(got, truth))


@dataclass(frozen=True)
class Case:
    """Ours and its rivals doing the same work in full.

    `ours` takes a backend's name; `limit` is the resource that bounds the op; `reset` makes accumulators zero, and
    outputs NaN, before a result is checked.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    shape: str
    backends: Sequence[str]
    ours: Callable[[str], Any]
    rivals: Mapping[str, Callable[[], Any]]
    gate: Gate
    flops: float
    bytes: float
    limit: peak.Kind
    reset: Callable[[], object] = lambda: None


# What a bench lists: the shape, by which it is selected, and how to make the case, tensors and all.
Plan = tuple[str, Callable[[], Case]]


def native_backends(device: torch.device, implementations: Mapping[str, object]) -> list[str]:
    """The backends beside torch that an op has for a device, best first."""
    return [name for name in _dispatch.PREFERENCE[device.type] if name in implementations and name != "torch"]


def arithmetic(dtype: torch.dtype) -> peak.Kind:
    """The arithmetic that bounds products of rows in `dtype`."""
    return {torch.float32: "fp32", torch.float64: "fp64"}.get(dtype, "bf16")  # type: ignore[return-value]


def measure(case: Case, rounds: int = 9) -> list[Row]:
    """Assert that ours is right on each backend, then time all in turns. Raises AssertionError before any timing when it is not.

    A backend that cannot run the case is named on stderr and left out; where none is left, ours is the op's plain torch.
    """
    ours = dict(_right_ones(case, case.backends))
    if not ours:
        ours = dict(_right_ones(case, ["torch"]))
    errors = {}
    for name, rival in case.rivals.items():
        case.reset()
        errors[name] = case.gate.error(case.gate.part(rival()))
    memory = {backend: peak_mib_of(partial(case.ours, backend), case.device) for backend in ours}

    variants = [partial(case.ours, backend) for backend in ours] + list(case.rivals.values())
    samples = timing.interleaved(variants, case.device, rounds, cold=case.limit == "copy")
    ours_samples, rival_samples = samples[: len(ours)], samples[len(ours) :]
    rows = []
    for (backend, error), own in zip(ours.items(), ours_samples, strict=True):
        ours_ms = statistics.median(own)
        tflops, gbytes_per_s = case.flops / ours_ms * 1e-9, case.bytes / ours_ms * 1e-6
        share = peak.share(case.device, case.limit, tflops, gbytes_per_s)
        if share and share > 1.05 and case.device.type == "cpu":
            note(f"{case.op} {case.shape}: {share:.0%} of the peak; the machine was busy while that was measured")
        for name, theirs in zip(case.rivals, rival_samples, strict=True):
            rival_ms = statistics.median(theirs)
            row = Row(
                op=case.op,
                backend=backend,
                device=case.device.type,
                hardware=hardware(case.device),
                dtype=str(case.dtype).removeprefix("torch."),
                shape=case.shape,
                rival=name,
                ours_ms=ours_ms,
                ours_spread=timing.spread(own),
                rival_ms=rival_ms,
                rival_spread=timing.spread(theirs),
                ratio=rival_ms / ours_ms,
                tflops=tflops if case.flops else None,
                peak_share=share,
                gbytes_per_s=gbytes_per_s,
                peak_mib=memory[backend],
                error=error,
                rival_error=errors[name],
                commit=commit(),
            )
            rows.append(row)
    return rows


def _right_ones(case: Case, backends: Sequence[str]) -> Iterator[tuple[str, float]]:
    """The backends that run the case, with their errors. Raises AssertionError for a wrong result."""
    for backend in backends:
        case.reset()
        try:
            got = case.gate.part(case.ours(backend))
        except BackendError as error:
            note(f"{case.op} {case.shape}: {error}")
            continue
        case.gate.assert_right(got)
        yield backend, case.gate.error(got)


def peak_mib_of(work: Callable[[], object], device: torch.device) -> float | None:
    """Memory that one run takes beyond what was held before it; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    release_free_memory()  # what malloc kept of an earlier run would be taken again unseen
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

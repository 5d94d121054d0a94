"""How time grows with rows, width and T: slopes in log-log, which ideally are the exponents of the work.

Small sizes are left out of a fit: there the launch (or waking the threads) is what is measured, not the work.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import assemble, gram, residual
from bench.harness import Case, measure
from bench.report import Row

# A point counts as past the launch overhead where it takes this many times as long as the fastest of them: a sixth of it is then overhead at most.
PAST_OVERHEAD = 6.0
LEAST_POINTS = 3
ALLOWED_DEVIATION = 0.1


@dataclass(frozen=True)
class Axis:
    """One quantity of one op that grows while the others stand still."""

    op: str
    quantity: str
    ideal: float  # exponent of the work
    sizes: Sequence[int]
    case: Callable[[str, int], Case]  # of (shape, size)
    fixed: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.quantity}"


@dataclass(frozen=True)
class Fit:
    slope: float
    intercept: float  # of log(time) at log(size) = 0
    first: int  # index of the first point that counted
    past_overhead: bool = True  # False: a point that counted may be launch overhead for a good part

    def at(self, size: float) -> float:
        return math.exp(self.intercept + self.slope * math.log(size))


@dataclass(frozen=True)
class Curve:
    axis: Axis
    sizes: list[int]
    rows: list[Row]
    fit: Fit

    def verdict(self) -> str:
        deviation = self.fit.slope / self.axis.ideal - 1
        within = abs(deviation) <= ALLOWED_DEVIATION
        return (
            f"{self.axis.op} against {self.axis.quantity} ({self.axis.fixed}; {self.rows[0].backend}): slope "
            f"{self.fit.slope:.2f} from {self.sizes[self.fit.first]} to {self.sizes[-1]}, ideal {self.axis.ideal:g}: "
            f"{'within' if within else 'NOT within'} {ALLOWED_DEVIATION:.0%} ({deviation:+.0%})"
            + ("" if self.fit.past_overhead else ", and too small to be past the launch overhead")
        )


def fit(sizes: Sequence[int], times_ms: Sequence[float]) -> Fit:
    """Least squares on the logarithms, over the sizes past the launch overhead, and at least the three largest.

    `sizes` increase. The points that count are the largest ones: all above the last that is not past the overhead.
    """
    if len(sizes) != len(times_ms) or len(sizes) < LEAST_POINTS:
        raise ValueError(
            f"a fit needs at least {LEAST_POINTS} sizes with a time each, not {len(sizes)} and {len(times_ms)}"
        )
    within_overhead = [i for i, time_ms in enumerate(times_ms) if time_ms < PAST_OVERHEAD * min(times_ms)]
    first = min(within_overhead[-1] + 1, len(sizes) - LEAST_POINTS)
    x = [math.log(size) for size in sizes[first:]]
    y = [math.log(time_ms) for time_ms in times_ms[first:]]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)
    return Fit(slope, y_mean - slope * x_mean, first, past_overhead=first > within_overhead[-1])


def axes(device: torch.device) -> list[Axis]:
    cuda, f32 = device.type == "cuda", torch.float32
    width, rows, outputs, order = (3072, 16384, 4096, 4096) if cuda else (768, 2048, 1024, 2048)
    counts = [1, 2, 4, 8, 16, 24, 32]  # as many Grams as the CUDA kernel takes in one pass
    return [
        Axis(
            "gram",
            "rows",
            1,
            _powers(64, 131072 if cuda else 32768),
            lambda shape, size: gram.case(device, shape, size, width, f32),
            f"width {width}",
        ),
        Axis(
            "gram",
            "width",
            2,
            _powers(64, 8192 if cuda else 4096),
            lambda shape, size: gram.case(device, shape, rows, size, f32),
            f"{rows} rows",
        ),
        Axis(
            "residual",
            "rows",
            1,
            _powers(64, 16384 if cuda else 8192),
            lambda shape, size: residual.case(device, shape, 4, size, width, f32),
            f"width {width}, T 4",
        ),
        Axis(
            "residual",
            "width",
            2,
            _powers(64, 8192 if cuda else 2048),
            lambda shape, size: residual.case(device, shape, 4, outputs, size, f32),
            f"{outputs} rows, T 4",
        ),
        Axis(
            "residual",
            "T",
            1,
            counts,
            lambda shape, size: residual.case(device, shape, size, outputs, width, f32),
            f"{outputs} rows, width {width}",
        ),
        Axis(
            "assemble",
            "width",
            2,
            _powers(64, 8192 if cuda else 4096),
            lambda shape, size: assemble.case(device, shape, 8, size, f32),
            "T 8",
        ),
        Axis(
            "assemble",
            "T",
            1,
            counts,
            lambda shape, size: assemble.case(device, shape, size, order, f32),
            f"width {order}",
        ),
    ]


def _powers(smallest: int, largest: int) -> list[int]:
    return [smallest << i for i in range((largest // smallest).bit_length())]


def measure_axis(axis: Axis, rounds: int) -> Curve:
    """Ours is the device's best backend. Raises AssertionError where a result is wrong."""
    rows = []
    for size in axis.sizes:
        case = axis.case(f"scaling, {axis.quantity} {size} ({axis.fixed})", size)
        rows.append(measure(replace(case, backends=case.backends[:1]), rounds)[0])
    return Curve(axis, list(axis.sizes), rows, fit(axis.sizes, [_time(row.ours_ms) for row in rows]))


def require_matplotlib() -> None:
    """Raises SystemExit before anything is measured, rather than after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib; pip install 'bmm-engine[demo]'")


def plot(found: Sequence[Curve], path: Path) -> None:
    """One panel per axis: ours, the rival, the fit, and a line of the ideal slope through the largest size."""
    from matplotlib.figure import Figure

    columns = min(4, len(found))
    lines = math.ceil(len(found) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines), layout="constrained")
    for index, curve in enumerate(found):
        panel = figure.add_subplot(lines, columns, index + 1)
        ours, theirs = [_time(row.ours_ms) for row in curve.rows], [_time(row.rival_ms) for row in curve.rows]
        fitted = curve.sizes[curve.fit.first :]
        ideal = [ours[-1] * (size / fitted[-1]) ** curve.axis.ideal for size in fitted]
        panel.plot(curve.sizes, theirs, "x", color="0.6", label=curve.rows[0].rival)
        panel.plot(curve.sizes, ours, "o", color="C0", label=f"bmm_engine, {curve.rows[0].backend}")
        panel.plot(
            fitted, [curve.fit.at(size) for size in fitted], "-", color="C0", label=f"slope {curve.fit.slope:.2f}"
        )
        panel.plot(fitted, ideal, ":", color="C3", label=f"slope {curve.axis.ideal:g}")
        panel.set(xscale="log", yscale="log", xlabel=curve.axis.quantity, ylabel="ms")
        panel.set_title(f"{curve.axis.op}: {curve.axis.fixed}", fontsize="medium")
        panel.legend(fontsize="small")
    figure.suptitle(f"{found[0].rows[0].hardware}, commit {found[0].rows[0].commit}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _time(milliseconds: float | None) -> float:
    assert milliseconds is not None
    return milliseconds

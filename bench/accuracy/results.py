"""Rows of results: as JSON, as a markdown table over seeds, and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.report import versions
from bmm_engine.evaluators.scores import Score


@dataclass(frozen=True)
class Result:
    """One way to merge at one seed, scored on test data; `normalised` by what each task's expert scores. Scores are in [0, 1]."""

    suite: str
    seed: int
    method: str
    anchor: str
    scores: dict[str, float]  # accuracy, or macro-F1, by task
    mean: float
    normalised: float  # mean over tasks of score / expert's score
    worst: float  # the least of these
    worst_task: str
    calibration_error: float  # expected, mean over tasks
    validation: float | None  # `normalised` on validation data
    seconds: float  # of the merge, searches included; statistics that rows share are measured before
    peak_mib: float | None  # what the merge takes beyond what was held before
    chosen: dict[str, Any] | None  # on validation data
    hardware: str
    commit: str
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def row(self) -> tuple[str, str]:
        return self.method, self.anchor


def normalised(scores: Mapping[str, Score], experts: Mapping[str, Score]) -> dict[str, float]:
    return {task: score.value / experts[task].value for task, score in scores.items()}


def read(path: Path) -> list[Result]:
    return [Result(**raw) for raw in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def write(results: Sequence[Result], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def by_row(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """The seeds of every row, rows in the order in which they came."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault(result.row, []).append(result)
    return found


def table(results: Sequence[Result]) -> str:
    """In markdown, in percent: mean and standard deviation over seeds."""
    tasks = list(results[0].scores)
    columns = ["method", "anchor", *tasks, "mean", "% of experts", "worst", "ECE", "seconds", "MiB", "seeds"]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "--:|" * (len(columns) - 2)]
    for (method, anchor), own in by_row(results).items():
        cells = [method, f"`{anchor}`" if anchor else ""]
        cells += [_percent([r.scores[task] for r in own]) for task in tasks]
        cells += [
            _percent([getattr(r, key) for r in own]) for key in ("mean", "normalised", "worst", "calibration_error")
        ]
        peaks = [r.peak_mib for r in own if r.peak_mib is not None]
        cells += [
            f"{statistics.mean(r.seconds for r in own):.1f}",
            f"{max(peaks):.0f}" if peaks else "-",
            str(len(own)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Result], path: Path) -> None:
    """Mean of score / expert's score, a bar for each row with the seeds as points; rows by value, methods by colour."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = sorted(by_row(results).items(), key=lambda item: statistics.mean(r.normalised for r in item[1]))
    figure = Figure(figsize=(9, 0.5 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(method for method, _ in by_row(results)))
    colours = colormaps["tab20"]
    for y, ((method, _), own) in enumerate(rows):
        values = [100 * r.normalised for r in own]
        axes.barh(y, statistics.mean(values), color=colours(kinds.index(method) % colours.N), alpha=0.75)
        axes.plot(values, [y] * len(values), "k.", markersize=3)
    axes.set_yticks(range(len(rows)), [f"{method} {anchor}".strip() for (method, anchor), _ in rows], fontsize=7)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(left=max(0.0, min(100 * r.normalised for r in results) - 5))
    axes.set_xlabel("mean of score / expert's score, %")
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _percent(values: Sequence[float]) -> str:
    centre = f"{100 * statistics.mean(values):.1f}"
    return f"{centre} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else centre

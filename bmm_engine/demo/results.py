"""The demo's outcome: one row per merging method, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bmm_engine.disk.files import write_whole
from bmm_engine.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Result:
    """Accuracies of one method in [0, 1]; `normalised` values are shares of what each task's own expert reaches."""

    method: str
    anchor: str | None
    scores: dict[str, float]
    mean: float
    mean_normalised: float
    worst: float
    worst_normalised: float
    seconds: float


class Results:
    """Rows in the order in which they are added, normalised by `expert_scores` (accuracy of each task's expert)."""

    def __init__(self, expert_scores: Mapping[str, float]):
        if not expert_scores or min(expert_scores.values()) <= 0:
            raise ConfigError(f"experts need accuracies above 0 to normalise by, got {dict(expert_scores)}")
        self._expert_scores = dict(expert_scores)
        self.rows: list[Result] = []

    def add(self, method: str, scores: Mapping[str, float], *, seconds: float, anchor: str | None = None) -> Result:
        """Append a row. Raises `ConfigError` unless `scores` has exactly the experts' tasks."""
        if scores.keys() != self._expert_scores.keys():
            raise ConfigError(f"{method} has scores for {sorted(scores)}, experts for {sorted(self._expert_scores)}")
        normalised = [scores[task] / expert for task, expert in self._expert_scores.items()]
        row = Result(
            method=method,
            anchor=anchor,
            scores={task: scores[task] for task in self._expert_scores},
            mean=sum(scores.values()) / len(scores),
            mean_normalised=sum(normalised) / len(normalised),
            worst=min(scores.values()),
            worst_normalised=min(normalised),
            seconds=seconds,
        )
        self.rows.append(row)
        return row

    def table(self) -> Table:
        """Accuracies in percent, and the mean as a share of the experts' as a bar too. The last row stands out."""
        from rich import box
        from rich.table import Table

        from bmm_engine.demo.share_bar import ShareBar

        table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        table.add_column("method", no_wrap=True)
        for column in (*self._expert_scores, "mean", "worst"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("mean, % of experts")
        full = max([1.0, *(row.mean_normalised for row in self.rows)])
        for row in self.rows:
            cells = [f"{100 * share:.1f}" for share in (*row.scores.values(), row.mean, row.worst)]
            style = "bold" if row is self.rows[-1] else ""
            table.add_row(row.method, *cells, ShareBar(row.mean_normalised, full), style=style)
        return table

    def write(self, path: Path) -> None:
        """Write the rows as a JSON list, whole or not at all."""
        write_whole(path, (json.dumps([asdict(row) for row in self.rows], indent=2) + "\n").encode())

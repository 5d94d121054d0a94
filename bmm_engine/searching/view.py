"""A search as it is watched: a live table on a terminal, a line for each trial elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bmm_engine.recipe.sections import SearchRecipe
from bmm_engine.searching.schema import Trial

LAST_TRIALS = 8


class Silent:
    """Looks away."""

    def begin(self) -> None: ...
    def end(self) -> None: ...
    def asked(self, trial: Trial) -> None: ...
    def told(self, trial: Trial) -> None: ...
    def tick(self, seconds: float) -> None: ...


class Lines(Silent):
    """A line for each trial, through `report`. Trials of an earlier run are summed up in one."""

    def __init__(self, report: Callable[[str], None]):
        self.report = report
        self.best: float | None = None
        self._replayed: set[int] = set()

    def told(self, trial: Trial) -> None:
        if trial.state == "finished" and trial.value is not None and (self.best is None or trial.value > self.best):
            self.best = trial.value
        best = "" if self.best is None else f", best {self.best:.4f}"
        what = f"{trial.value:.4f}" if trial.value is not None else str(trial.error)
        took = "" if trial.seconds is None else f", {trial.seconds:.1f} s"
        state = "" if trial.state == "finished" else f" {trial.state}"
        self.report(f"trial {trial.number} ({trial.kind}){state}: {what}{best}{took}")


class LiveView(Silent):
    """The best so far, the last trials, what runs and how long is left."""

    def __init__(self, console: Console, options: SearchRecipe):
        self.options = options
        self.trials: list[Trial] = []
        self.running: dict[int, Trial] = {}
        self.spent = 0.0  # by all runs of the study, when last told
        self.told_at = time.monotonic()
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def begin(self) -> None:
        self._live.start()

    def end(self) -> None:
        self._live.stop()

    def asked(self, trial: Trial) -> None:
        self.running[trial.number] = trial

    def told(self, trial: Trial) -> None:
        self.running.pop(trial.number, None)
        self.trials.append(trial)

    def tick(self, seconds: float) -> None:
        self.spent, self.told_at = seconds, time.monotonic()

    @property
    def best(self) -> Trial | None:
        finished = [t for t in self.trials if t.state == "finished" and t.value is not None]
        return max(finished, key=lambda t: (t.value or 0.0, -t.number), default=None)

    def render(self) -> RenderableType:
        best = self.best
        shown = ([best] if best is not None else []) + self.trials[-LAST_TRIALS:]
        tasks = list(best.scores) if best is not None else []
        table = Table(title=self._title(), title_justify="left", show_edge=False, pad_edge=False)
        for column in ("trial", "kind", "objective", *tasks[:8], "s"):
            table.add_column(column, justify="left" if column in ("trial", "kind") else "right", no_wrap=True)
        for i, trial in enumerate(shown):
            scores = [f"{100 * trial.scores[t].value:.1f}" if t in trial.scores else "" for t in tasks[:8]]
            value = f"{trial.value:.4f}" if trial.value is not None else trial.state
            seconds = f"{trial.seconds:.1f}" if trial.seconds is not None else ""
            style = "bold green" if i == 0 and best is not None else "dim" if trial.state != "finished" else ""
            table.add_row(f"{trial.number}", trial.kind, value, *scores, seconds, style=style, end_section=i == 0)
        total = self.options.trials
        bar: list[Any] = [] if total is None else [ProgressBar(total=total, completed=len(self.trials), width=60)]
        return Group(table, *bar, Text(self._left(), style="dim"))

    def _title(self) -> str:
        total = "" if self.options.trials is None else f" of {self.options.trials}"
        return f"{len(self.trials)}{total} trials, {len(self.running)} running; best first"

    def _left(self) -> str:
        seconds = [t.seconds for t in self.trials if t.seconds is not None]
        parts = []
        if self.options.trials is not None and seconds:
            left = max(0, self.options.trials - len(self.trials))
            mean = sum(seconds) / len(seconds) / max(1, len(self.running))
            parts.append(f"about {_duration(left * mean)} left")
        if self.options.minutes is not None:
            spent = self.spent + time.monotonic() - self.told_at
            parts.append(f"{_duration(max(0.0, 60 * self.options.minutes - spent))} of the time left")
        return ", ".join(parts) or "the first trials run"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""What a report is about, read from a study once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bmm_engine.checkpoint import RECORD_FILENAME
from bmm_engine.checkpoint.provenance import read_merge_record
from bmm_engine.evaluators.scores import Score
from bmm_engine.searching.objective import Objective, get_objective, normalized
from bmm_engine.searching.schema import Trial
from bmm_engine.searching.study import Study


@dataclass(frozen=True)
class Contents:
    """`record` and trials of a study, with its facts as scores. `running`: a process drives it now; `complete`: it ended and said so."""

    name: str
    record: Mapping[str, Any]
    trials: tuple[Trial, ...]
    experts: Mapping[str, Mapping[str, Score]]  # split -> task -> score
    test: Mapping[int, Mapping[str, Score]]  # trial -> task -> score
    alignment: Mapping[str, Mapping[str, float]]
    seconds: float
    running: bool
    complete: bool
    objective: Objective | None = field(default=None)
    inputs: tuple[Mapping[str, Any], ...] = ()  # of the written merge, in the mode sequential
    chosen: int | None = None  # the trial that the search took in the end

    @classmethod
    def of(cls, study: Study) -> Contents:
        experts = study.fact("experts") or {}
        result = study.fact("result") or {}
        # A function is not imported: to look at somebody's study is not to run their code. What it gave is recorded.
        name = study.record["objective"]
        objective = None if ":" in name else get_objective(name)
        complete = bool(result) and not _went_on(study, result)
        return cls(
            study.folder.name.removesuffix(".study"),
            study.record,
            tuple(study.trials()),
            {split: _scores(own) for split, own in experts.items()},
            {int(number): _scores(own) for number, own in (study.fact("test") or {}).items()},
            study.fact("alignment") or {},
            float(result.get("seconds") or study.fact("active_seconds") or 0.0),
            study.driver_alive(),
            complete,
            objective,
            _inputs(result.get("output"), len(study.record["tasks"])),
            result["best"] if complete else None,
        )

    @property
    def tasks(self) -> list[str]:
        return list(self.record["tasks"])

    @property
    def finished(self) -> list[Trial]:
        return [t for t in self.trials if t.state == "finished" and t.value is not None]

    @property
    def told(self) -> list[Trial]:
        """In the order of telling."""
        return sorted((t for t in self.trials if t.tell_event is not None), key=lambda t: t.tell_event or 0)

    @property
    def best(self) -> Trial | None:
        """The one that was taken; while the search runs, the one of the highest value."""
        if self.chosen is not None:
            return next((t for t in self.finished if t.number == self.chosen), None)
        return max(self.finished, key=lambda t: (t.value or 0.0, -t.number), default=None)

    def first(self, kind: str) -> Trial | None:
        """The anchor's or default's trial on the best one's anchor."""
        best = self.best
        own = [t for t in self.finished if t.kind == kind]
        return next((t for t in own if best and t.parameters["anchor"] == best.parameters["anchor"]), None)

    def rows(self) -> list[tuple[str, Trial | None]]:
        """Experts, anchor, default and best, as far as they are there."""
        found: list[tuple[str, Trial | None]] = [("experts", None)] if self.experts else []
        for name, trial in (("anchor", self.first("anchor")), ("default", self.first("default")), ("best", self.best)):
            if trial is not None:
                found.append((name, trial))
        return found

    def scores(self, trial: Trial | None, split: str) -> Mapping[str, Score]:
        """By task; {} where they are not known. None stands for the experts."""
        if trial is None:
            return self.experts.get(split, {})
        return trial.scores if split == "validation" else self.test.get(trial.number, {})

    def value(self, trial: Trial | None, split: str) -> float | None:
        """The objective of a trial on a split."""
        if trial is not None and split == "validation":
            return trial.value
        scores, experts = self.scores(trial, split), self.experts.get(split, {})
        if not scores or not experts or self.objective is None:
            return None
        values = ({task: own[task].value for task in self.tasks} for own in (scores, experts))
        return self.objective(normalized(*values))


def _went_on(study: Study, result: Mapping[str, Any]) -> bool:
    """Did a finished study go on with a larger budget, and stop?"""
    if study.trials(["waiting", "running", "evaluated"]):
        return True
    ended = datetime.fromisoformat(result["finished_at"])
    return any(
        t.finished_at and datetime.fromisoformat(t.finished_at).replace(microsecond=0) > ended for t in study.trials()
    )


def _inputs(output: str | None, tasks: int) -> tuple[Mapping[str, Any], ...]:
    """What the written merge found at its inputs, where there is one of as many experts as there are tasks."""
    path = None if output is None else Path(output) / RECORD_FILENAME
    if path is None or not path.is_file():
        return ()
    found = (read_merge_record(path).get("modules") or {}).get("inputs") or ()
    return tuple(own for own in found if len(own["before"]) == tasks)


def _scores(raw: Mapping[str, Any]) -> dict[str, Score]:
    return {task: Score.from_plain(own) for task, own in raw.items()}

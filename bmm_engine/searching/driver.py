"""The loop of a search: ask, run, record, tell; and how a study goes on where it stopped."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from bmm_engine.errors import BmmError, NumericalWarning, SearchError, SearchExhaustedError
from bmm_engine.evaluators.scores import Score
from bmm_engine.executors import Completed, Executor
from bmm_engine.recipe.sections import SearchRecipe
from bmm_engine.searching.objective import Objective, normalized
from bmm_engine.searching.proposer import Proposer
from bmm_engine.searching.schema import Trial
from bmm_engine.searching.space import Candidate
from bmm_engine.searching.study import Study
from bmm_engine.searching.trial import Bar, Outcome, optimistic
from bmm_engine.searching.workers import run_trial

# So many failed trials in a row mean that something is wrong with more than one candidate.
MOST_FAILURES = 5
# Trials that wait for each joined worker, so that none idles while this process is busy.
WAITING_PER_JOINED = 2
POLL_S = 0.2
DRIVER = "driver"


class Watcher(Protocol):
    """Who looks on. Between `begin` and `end` trials run, and a display has the terminal to itself."""

    def begin(self) -> None: ...
    def end(self) -> None: ...
    def asked(self, trial: Trial) -> None: ...
    def told(self, trial: Trial) -> None: ...
    def tick(self, seconds: float) -> None: ...


@dataclass
class Clock:
    """Seconds that a study has been worked on, over all its runs."""

    study: Study
    before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.before = float(self.study.fact("active_seconds") or 0.0)

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def keep(self) -> None:
        self.study.set_fact("active_seconds", self.seconds)


class Driver:
    """Carries a study to its budget. `experts`: each task's score by its own expert; the executor's workers hold a `TrialRunner` each."""

    def __init__(
        self,
        study: Study,
        proposer: Proposer,
        executor: Executor,
        objective: Objective,
        options: SearchRecipe,
        experts: Mapping[str, float],
        watcher: Watcher,
    ):
        self.study, self.proposer, self.executor = study, proposer, executor
        self.objective, self.options, self.experts, self.watcher = objective, options, dict(experts), watcher
        self.clock = Clock(study)
        self._running: set[int] = set()  # what this process's own workers are at
        self._ask_seconds: dict[int, float] = {}
        self._failures = 0
        self._exhausted = False
        self._best: Trial | None = None
        self._first: dict[str, float] = {}  # of the first finished trial, by task: which tasks are hard
        self._top: dict[str, float] = {}  # the best of each task so far
        self._asked = 0

    def run(self) -> Trial:
        """The best trial, once the budget is spent. Raises `SearchError` if no trial succeeds, or trial after trial fails."""
        self.watcher.begin()
        try:
            self._restore()
            self._loop()
        finally:
            self.watcher.end()
            self.clock.keep()
        if self._best is None:
            raise SearchError("no trial succeeded; see the errors of the study's trials.")
        return self._best

    def _loop(self) -> None:
        while True:
            self._fill()
            if not self._running and not self._others_at_work():
                break
            for done in self.executor.wait(POLL_S if self._joined else None) if self._running else self._sleep():
                self._completed(done)
            self.service()
            self.watcher.tick(self.clock.seconds)

    def service(self) -> None:
        """What must not wait for a trial to end: take joined workers' results, give back what dead ones had, give them more."""
        for trial in self.study.orphans():
            self.study.give_back(trial.number)
        self._tell_ready()
        if self._joined and self.options.schedule == "asynchronous":
            waiting = len(self.study.trials(["waiting"]))
            while waiting < WAITING_PER_JOINED * self._joined and self._may_ask():
                if self._ask(waiting=True) is None:
                    break
                waiting += 1

    # Asking

    def _fill(self) -> None:
        """Keep every worker busy. In the synchronous schedule new trials are asked for only when all earlier ones are told."""
        ahead = self.options.schedule == "asynchronous" or self.proposer.pending == 0
        while len(self._running) < self.executor.workers:
            # What waits, of an earlier run or given back, is left to joined workers where there are any.
            waiting = [] if self._joined else self.study.trials(["waiting"])
            trial = waiting[0] if waiting else self._ask(waiting=False) if ahead and self._may_ask() else None
            if trial is None:
                return
            self._submit(trial)

    def _may_ask(self) -> bool:
        """The anchors and defaults are run whatever the budget: what a search returns is never worse than they are."""
        if self.proposer.first:
            return True
        trials, minutes = self.options.trials, self.options.minutes
        spent = minutes is not None and self.clock.seconds >= 60 * minutes
        return not self._exhausted and not spent and (trials is None or self._asked < trials)

    def _ask(self, waiting: bool) -> Trial | None:
        started = time.perf_counter()
        try:
            kind, candidate = self.proposer.ask(self._asked)
        except SearchExhaustedError:
            self._exhausted = True
            return None
        trial = self.study.add(kind, candidate.plain(), waiting=waiting, worker=None if waiting else DRIVER)
        assert trial.number == self._asked
        self._asked += 1
        self._ask_seconds[trial.number] = time.perf_counter() - started
        self.watcher.asked(trial)
        return trial

    def _submit(self, trial: Trial) -> None:
        if trial.state == "waiting" and not self.study.start(trial.number, DRIVER):
            return  # a worker that has joined just now was faster
        self._running.add(trial.number)
        self.executor.submit(trial.number, run_trial, trial.parameters, self._bar(trial))

    def _bar(self, trial: Trial) -> Bar | None:
        """The bar of a race; none for the first trials, which are what others are compared with."""
        if not self.options.racing or trial.kind != "proposed" or self._best is None or self._best.value is None:
            return None
        credit = {task: top + self.options.racing_margin for task, top in self._top.items()}
        hardest = sorted(self.experts, key=lambda task: self._first[task])
        return Bar(self._best.value, credit, self.experts, tuple(hardest))

    # Recording and telling

    def _completed(self, done: Completed) -> None:
        number = int(done.job)  # type: ignore[call-overload]
        self._running.discard(number)
        spent = self._ask_seconds.pop(number, 0.0)
        if done.error is not None:
            self._failed(number, done.error)
            return
        outcome: Outcome = done.result
        self.study.evaluated(
            number,
            outcome.scores,
            outcome.seconds + spent,
            outcome.evaluation_seconds,
            DRIVER,
            pruned_after=outcome.pruned_after,
        )

    def _failed(self, number: int, error: BaseException) -> None:
        """Raises `SearchError` where more than one candidate seems to be at fault; an anchor or default is run again when the cause is mended."""
        if not isinstance(error, BmmError):
            raise error
        trial = self.study.trial(number)
        if trial.kind != "proposed":
            self.study.give_back(number)
            raise SearchError(f"trial {number} ({trial.kind}) failed: {error}") from error
        self._told_failed(trial, error)

    def _told_failed(self, trial: Trial, error: BmmError) -> None:
        self.study.tell(trial.number, None, state="failed", error=str(error))
        self._tell(self.study.trial(trial.number))
        self._failures += 1
        if self._failures >= MOST_FAILURES:
            raise SearchError(f"{self._failures} trials in a row failed, the last with: {error}") from error

    def _tell_ready(self) -> None:
        """Tell what is evaluated; in the synchronous schedule a whole batch, in the order of asking."""
        ready = self.study.trials(["evaluated"])
        if self.options.schedule == "synchronous" and len(ready) < self.proposer.pending:
            return
        for trial in sorted(ready, key=lambda t: t.number):
            if trial.error is not None:  # a joined worker's
                self._told_failed(trial, SearchError(trial.error))
                continue
            value = self._value(trial)
            complete = set(trial.scores) == set(self.experts)
            self.study.tell(trial.number, value, state="finished" if complete else "pruned")
            self._failures = 0
            self._tell(self.study.trial(trial.number))
        self.clock.keep()

    def _value(self, trial: Trial) -> float:
        """The objective; of a trial that was given up, what it could have reached at most, which is below the best."""
        if set(trial.scores) == set(self.experts):
            return self.objective(normalized(_values(trial), self.experts))
        bar = self._bar(trial)
        assert bar is not None
        return min(optimistic(self.objective, trial.scores, bar), bar.best)

    def _tell(self, trial: Trial) -> None:
        self.proposer.tell(trial.number, trial.value)
        if trial.state == "finished":
            own = normalized(_values(trial), self.experts)
            self._first = self._first or own
            self._top = {task: max(value, self._top.get(task, value)) for task, value in own.items()}
            if self._best is None or (trial.value, -trial.number) > (self._best.value, -self._best.number):
                self._best = trial
        self.watcher.told(trial)

    # Going on

    def _restore(self) -> None:
        """Replay what is recorded, and queue what was in flight."""
        alive = {p.name for p in self.study.participants()}
        for trial in self.study.trials(["running"]):
            if trial.worker not in alive:
                self.study.give_back(trial.number)
        same = True
        for event, trial in self.study.events():
            if event == "ask":
                same = self._replay_ask(trial, same)
                self._asked = trial.number + 1
            else:
                self._tell(trial)
        self._tell_ready()

    def _replay_ask(self, trial: Trial, same: bool) -> bool:
        recorded = Candidate.from_plain(trial.parameters)
        if same:
            try:
                _, candidate = self.proposer.ask(trial.number)
                if candidate.key == recorded.key:
                    return True
            except SearchExhaustedError:
                pass
            warnings.warn(
                f"trial {trial.number} of {self.study.folder} was proposed by another version of the optimiser than is installed now; the search goes"
                " on from its results, but not with the same trials as without the interruption.",
                NumericalWarning,
                stacklevel=2,
            )
            self.proposer.forget(trial.number)
        self.proposer.adopt(trial.number, recorded)
        return False

    @property
    def _joined(self) -> int:
        return len(self.study.participants())

    def _others_at_work(self) -> bool:
        return bool(self._joined and self.study.trials(["waiting", "running", "evaluated"]))

    def _sleep(self) -> list[Completed]:
        time.sleep(POLL_S)
        return []


def _values(trial: Trial) -> dict[str, float]:
    return {task: score.value for task, score in trial.scores.items()}


def scores_plain(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {task: score.plain() for task, score in scores.items()}

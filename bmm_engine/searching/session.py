"""One run of a study: what is computed before its trials, the trials, and what is judged after them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bmm_engine.checkpoint.ownership import record_digest
from bmm_engine.evaluators.scores import Score
from bmm_engine.executors import Executor, Shared, run_all
from bmm_engine.merging.factors import FactorGroup, plain_alignment
from bmm_engine.progress import Report
from bmm_engine.searching.driver import Driver, Watcher, scores_plain
from bmm_engine.searching.objective import normalized, standard_error
from bmm_engine.searching.problem import Problem, common_tensors
from bmm_engine.searching.proposer import Proposer
from bmm_engine.searching.schema import Trial
from bmm_engine.searching.study import Study
from bmm_engine.searching.workers import Opener, make_factors, open_judge, open_runner, run_trial, score_expert


@dataclass(frozen=True)
class Prepared:
    """Anchors and factors of a problem, once for all trials: groups, and tensors by the names of `Factors`, at hand for every worker."""

    groups: list[FactorGroup]
    shared: Shared
    seconds: float


def prepare(problem: Problem, opener: Opener, executor: Executor) -> Prepared:
    """Merge with every anchor, and decompose every group (which free task weights, or a walk for each trial, would make useless: then only the
    anchors)."""
    started = time.perf_counter()
    anchors = {label: problem.anchor_tensors(label) for label in problem.anchors}
    tensors, groups = common_tensors(problem, anchors), []
    if problem.walk is None and not problem.space.free_tasks:
        shared = executor.share({name: t for name, t in tensors.items() if name.startswith("a ")})
        for group, own in make_factors(executor, opener, problem, shared):
            groups.append(group)
            tensors.update(own)
    return Prepared(groups, executor.share(tensors), time.perf_counter() - started)


class Session:
    """One run of a study: what is computed before its trials, the trials, and what is judged after them."""

    def __init__(
        self,
        problem: Problem,
        opener: Opener,
        study: Study,
        executor: Executor,
        device: str,
        watcher: Watcher,
        report: Report,
        prepared: Prepared | None = None,
    ):
        self.problem, self.opener, self.study, self.executor = problem, opener, study, executor
        self.device, self.watcher, self.report = device, watcher, report
        self.objective = problem.goal
        self.seconds = 0.0
        self._prepared = prepared

    def run(self) -> Trial:
        """The best trial of the whole study, with the test scores of the trials that matter."""
        experts = {task: score.value for task, score in self.expert_scores("validation").items()}
        normalized(experts, experts)  # an expert that scores nothing is found out before anything else is computed
        if self._prepared is None:
            self._prepared = prepare(self.problem, self.opener, self.executor)
            self.report(self._plan())
        if self.study.fact("alignment") is None and self._prepared.groups:
            self.study.set_fact("alignment", plain_alignment(self._prepared.groups, self._expert_labels()))
        driver = self._driver(experts)
        best = self._chosen(driver.run(), experts)
        self.seconds = driver.clock.seconds
        self._judge(best)
        return best

    def _chosen(self, best: Trial, experts: Mapping[str, float]) -> Trial:
        """The best trial, if it leads over the first candidates by more than chance would let it; else the best of those."""
        first = [t for t in self.study.trials(["finished"]) if t.kind != "proposed" and t.value is not None]
        if best.kind != "proposed" or not first:
            return best
        known = max(first, key=lambda t: (t.value or 0.0, -t.number))
        error = standard_error(self.objective, best.scores, experts)
        needed, lead = self.problem.search.lead * error, (best.value or 0.0) - (known.value or 0.0)
        if lead > needed:
            return best
        self.report(
            f"the best candidate (trial {best.number}, {best.value:.4f}) leads over the {known.kind} (trial {known.number}, {known.value:.4f}) by"
            f" {lead:.4f}, not by more than {needed:.4f} ({self.problem.search.lead:g} standard errors of the validation scores): the {known.kind} is"
            " taken. More validation data, or a smaller `search.lead`, would let it win."
        )
        return known

    def _plan(self) -> str:
        """What was prepared, and what a trial costs."""
        assert self._prepared is not None
        seconds, modules, groups = self._prepared.seconds, len(self.problem.modules), len(self.problem.groups)
        if self.problem.walk is not None:
            return (
                f"mode sequential: {groups} search groups; every trial walks through the network and solves {modules} modules anew, which takes"
                " about as long as the merge itself (only the experts' passes are kept after the first)"
            )
        inputs = len(self.problem.plan.groups)
        return f"{modules} modules with {inputs} inputs factored in {seconds:.1f} s, {groups} search groups"

    def _driver(self, experts: Mapping[str, float]) -> Driver:
        proposer = Proposer(
            self.problem.space,
            seed=self.problem.search.seed,
            budget=self.study.record["budget"]["trials"],
            workers=self.executor.workers,
        )
        driver = Driver(self.study, proposer, self.executor, self.objective, self.problem.search, experts, self.watcher)
        self._start("validation", driver.service if self.executor.workers <= 1 else None)
        return driver

    def _expert_labels(self) -> list[str]:
        names = self.problem.tasks.names
        count = len(self.problem.models.experts)
        return list(names) if len(names) == count else [f"expert {i}" for i in range(count)]

    def _start(self, split: str, tick: Callable[[], None] | None = None) -> None:
        assert self._prepared is not None
        prepared = self._prepared
        self.executor.start(open_runner, self.opener, prepared.groups, prepared.shared, split, self.device, tick)

    def expert_scores(self, split: str) -> dict[str, Score]:
        """Each task's score by its own expert (of several, the best); measured once in a study."""
        known = self.study.fact("experts") or {}
        if split not in known:
            calls = [(index,) for index in range(len(self.problem.models.experts))]
            self.executor.start(open_judge, self.opener, split, self.device)
            found: dict[str, Score] = {}
            for scores in run_all(self.executor, score_expert, calls, label=f"scoring the experts ({split})"):
                for task, score in scores.items():
                    if task not in found or score.value > found[task].value:
                        found[task] = score
            if not found:
                return {}
            known[split] = scores_plain({task: found[task] for task in self.problem.tasks.names})
            self.study.set_fact("experts", known)
        return {task: Score.from_plain(raw) for task, raw in known[split].items()}

    def _judge(self, best: Trial) -> None:
        """The test scores of the anchor, the default, every trial that was once the best, and the best."""
        if not self.expert_scores("test"):
            return
        known = dict(self.study.fact("test") or {})
        wanted = [t for t in self._remarkable(best) if str(t.number) not in known]
        if not wanted:
            return
        self._start("test")
        for trial in wanted:
            self.executor.submit(trial.number, run_trial, trial.parameters, None)
        left = len(wanted)
        while left:
            for done in self.executor.wait():
                left -= 1
                if done.error is not None:
                    raise done.error
                known[str(done.job)] = scores_plain(done.result.scores)
                self.study.set_fact("test", known)

    def _remarkable(self, best: Trial) -> list[Trial]:
        found, top = [], None
        for trial in sorted(self.study.trials(["finished"]), key=lambda t: t.tell_event or 0):
            leads = top is None or (trial.value or 0.0) > top
            top = trial.value if leads else top
            if leads or trial.kind != "proposed" or trial.number == best.number:
                found.append(trial)
        return found

    def rows(self, best: Trial) -> list[dict[str, Any]]:
        """What a person wants to see: experts, the best one's anchor by itself, the default on it, the best."""
        experts = {split: self.expert_scores(split) for split in ("validation", "test")}
        rows = [
            {"name": "experts", "trial": None, **self._columns({s: own for s, own in experts.items() if own}, experts)}
        ]
        test = self.study.fact("test") or {}
        anchor = best.parameters["anchor"]
        named = [
            (t.kind, t)
            for t in self.study.trials(["finished"])
            if t.kind != "proposed" and t.parameters["anchor"] == anchor
        ]
        for name, trial in (*named, ("best", best)):
            own = {"validation": trial.scores}
            if str(trial.number) in test:
                own["test"] = {task: Score.from_plain(raw) for task, raw in test[str(trial.number)].items()}
            rows.append(
                {
                    "name": f"{name} ({anchor})" if name != "best" else name,
                    "trial": trial.number,
                    **self._columns(own, experts),
                }
            )
        return rows

    def objective_of(self, scores: Mapping[str, Any], split: str) -> float:
        """Of plain scores by task on a split."""
        reference = {task: score.value for task, score in self.expert_scores(split).items()}
        return self.objective(
            normalized({task: Score.from_plain(raw).value for task, raw in scores.items()}, reference)
        )

    def _columns(
        self, own: Mapping[str, Mapping[str, Score]], experts: Mapping[str, Mapping[str, Score]]
    ) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        for split, scores in own.items():
            reference = {task: score.value for task, score in experts[split].items()}
            values = {task: score.value for task, score in scores.items()}
            columns[split] = {
                "objective": self.objective(normalized(values, reference)),
                "scores": scores_plain(scores),
            }
        return columns

    def finish(self, best: Trial, output: Path | None) -> None:
        self.study.set_fact(
            "result",
            {
                "best": best.number,
                "seconds": self.seconds,
                "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "output": None if output is None else str(output.resolve()),
                "record": None if output is None else record_digest(output),
            },
        )

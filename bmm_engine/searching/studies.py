"""Studies of how much a search needs: accuracy on the test data against the share of the validation data, and against the number of trials.

Each cell (anchor, source of Grams, seed, share) is a search of its own, with a study of its own on disk, so a study of studies goes on where it
stopped. (Figures of this kind are in the BMM paper, arXiv 2605.12843.)
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bmm_engine.disk.files import is_file, named, read_identity, write_whole
from bmm_engine.errors import ConfigError, OutputExistsError
from bmm_engine.evaluators.contract import Evaluator
from bmm_engine.evaluators.scores import Score
from bmm_engine.executors import Executor, open_executor
from bmm_engine.executors.devices import check_device
from bmm_engine.merging.plan import MergePlan
from bmm_engine.pipeline.live import LiveModels
from bmm_engine.pipeline.models import open_models
from bmm_engine.pipeline.tasks import check_tasks
from bmm_engine.progress import Report
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.references import AnchorRecipe
from bmm_engine.searching.identity import identity_of
from bmm_engine.searching.problem import Problem, Tasks
from bmm_engine.searching.run import open_study
from bmm_engine.searching.schema import Trial
from bmm_engine.searching.session import Prepared, Session, prepare
from bmm_engine.searching.view import Silent
from bmm_engine.searching.workers import RecipeProblem, with_grams, with_search_weights
from bmm_engine.statistics.text_file import check_output_path

RESULTS, PICTURE = "results.json", "study.png"
_FORMAT = "bmm-study"


@dataclass(frozen=True)
class Axes:
    """What a study varies beside its own axis. `anchors`: names; `sources`: "data", "task_vectors" (data-free), "hybrid"; `seeds`: how many."""

    anchors: tuple[str, ...]
    sources: tuple[str, ...]
    seeds: int


@dataclass(frozen=True)
class Point:
    """One cell at one place of the axis: objectives, where the experts have 1, on validation and test; the default's and the anchor's beside."""

    anchor: str
    source: str
    seed: int
    x: float
    validation: float
    test: float
    default_test: float
    anchor_test: float


@dataclass
class SubsetTasks:
    """Tasks whose validation data are a random share of what there is; the same for the same seed, and smaller shares within larger ones."""

    tasks: Tasks
    share: float
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        return self.tasks.names

    def live(self, plan: MergePlan, device: str) -> LiveModels:
        return self.tasks.live(plan, device)

    def evaluator(self, split: str) -> Evaluator | None:
        evaluator: Any = self.tasks.evaluator(split)
        if split != "validation" or self.share == 1 or evaluator is None:
            return evaluator
        if not hasattr(evaluator, "subset"):
            raise ConfigError(
                f"a share of the validation data can be taken of labelled data and texts, not of {type(evaluator).__name__}'s."
            )
        return evaluator.subset(self.share, self.seed)

    def expert_scores(self, expert: int, evaluator: Evaluator, device: str) -> dict[str, Score]:
        return self.tasks.expert_scores(expert, evaluator, device)


@dataclass(frozen=True)
class CellProblem:
    """Opens the problem of one cell, wherever it is called."""

    whole: RecipeProblem
    share: float
    seed: int

    def __call__(self) -> Problem:
        problem = self.whole()
        return replace(problem, tasks=SubsetTasks(problem.tasks, self.share, self.seed))


def validation_fraction(
    recipe: Recipe,
    output: Path,
    axes: Axes,
    shares: Sequence[float],
    *,
    workers: int = 0,
    local_files_only: bool = False,
    report: Report = lambda line: None,
) -> list[Point]:
    """The test objective of what a search with each share of the validation data finds. Raises `ConfigError` for a share outside (0, 1]."""
    for share in shares:
        if not 0 < share <= 1:
            raise ConfigError(f"shares of the validation data lie in (0, 1], not {share}.")

    def points(session: Session, best: Trial, cell: Cell) -> list[Point]:
        return [_point(session, best, cell, cell.share)]

    return _run(recipe, output, axes, shares, points, "share", workers, local_files_only, report)


def number_of_trials(
    recipe: Recipe,
    output: Path,
    axes: Axes,
    counts: Sequence[int],
    *,
    workers: int = 0,
    local_files_only: bool = False,
    report: Report = lambda line: None,
) -> list[Point]:
    """The test objective of the best of the first n trials, for each n of `counts`, all out of one search of the largest."""
    if min(counts) < 1:
        raise ConfigError(f"numbers of trials must be at least 1, not {min(counts)}.")
    recipe = recipe.with_search(trials=max(counts), minutes=None)

    def points(session: Session, best: Trial, cell: Cell) -> list[Point]:
        told = sorted(session.study.trials(["finished"]), key=lambda t: t.tell_event or 0)
        found = []
        for count in counts:
            first = [t for t in told if t.number < count]
            if first:
                leader = max(first, key=lambda t: (t.value or 0.0, -t.number))
                found.append(_point(session, leader, cell, count))
        return found

    return _run(recipe, output, axes, [1.0], points, "trials", workers, local_files_only, report)


@dataclass(frozen=True)
class Cell:
    anchor: str
    source: str
    seed: int
    share: float

    @property
    def name(self) -> str:
        return f"{self.anchor}-{self.source}-{self.share:g}-{self.seed}"


def _run(
    recipe: Recipe,
    output: Path,
    axes: Axes,
    shares: Sequence[float],
    points: Callable[[Session, Trial, Cell], list[Point]],
    axis: str,
    workers: int,
    local_files_only: bool,
    report: Report,
) -> list[Point]:
    check_device(recipe.device)
    check_output_path(output)
    check_study_of_studies(output)
    check_tasks(recipe)
    if any(e.test is None for e in recipe.experts) and recipe.evaluation is not None and not recipe.evaluation.tasks:
        raise ConfigError("a study is judged on test data: give every expert a `test` file.")
    cells = output / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    found: list[Point] = []
    models = open_models(recipe, local_files_only)
    with ExitStack() as stack:
        executor = stack.enter_context(open_executor(workers, None, folder=output))
        for anchor in axes.anchors:
            for source in axes.sources:
                chosen = with_search_weights(_with_choice(recipe, anchor, source), models, report)
                measured = with_grams(chosen, output, executor, local_files_only, report)
                identity = identity_of(chosen, models, executor.workers)
                prepared: Prepared | None = None
                for share in shares:
                    for seed in range(axes.seeds):
                        cell = Cell(anchor, source, seed, share)
                        own = measured.with_search(seed=seed)
                        opener = CellProblem(RecipeProblem(own, local_files_only, models), share, seed)
                        if prepared is None:
                            prepared = prepare(opener(), opener, executor)
                        own_identity = {
                            **identity,
                            "share": share,
                            "seed": seed,
                        }
                        found += _cell(
                            cells / f"{cell.name}.study",
                            opener,
                            own_identity,
                            own,
                            executor,
                            prepared,
                            points,
                            cell,
                            report,
                        )
                        results = {"format": _FORMAT, "axis": axis, "points": [vars(p) for p in found]}
                        write_whole(output / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    return found


def check_study_of_studies(output: Path) -> None:
    """Refuse a folder whose results, or picture, another program wrote: they are known for ours by the results' format, which are written first.

    Raises `OutputExistsError`."""
    taken = [name for name in (RESULTS, PICTURE) if os.path.lexists(output / name)]
    if taken and (
        read_identity(output / RESULTS, _FORMAT) is None or not all(is_file(output / name) for name in taken)
    ):
        raise OutputExistsError(
            f"{output}: holds {named(taken)} of something else than a study by this engine, which would write files of these names. Move them"
            " elsewhere, or choose another output."
        )


def _cell(
    folder: Path,
    opener: CellProblem,
    identity: dict[str, Any],
    recipe: Recipe,
    executor: Executor,
    prepared: Prepared,
    points: Callable[[Session, Trial, Cell], list[Point]],
    cell: Cell,
    report: Report,
) -> list[Point]:
    problem = opener()
    with open_study(folder, problem, identity, recipe) as study, study.drive():
        session = Session(problem, opener, study, executor, recipe.device, Silent(), lambda line: None, prepared)
        best = session.run()
        session.finish(best, None)
        found = points(session, best, cell)
    for point in found:
        report(
            f"{cell.anchor}, {cell.source}, seed {cell.seed}, {point.x:g}: validation {100 * point.validation:.2f} %, test {100 * point.test:.2f} %"
        )
    return found


def _with_choice(recipe: Recipe, anchor: str, source: str) -> Recipe:
    own = recipe.anchor if recipe.anchor.name == anchor else AnchorRecipe(name=anchor)
    changed = recipe.plain() | {"anchor": own.model_dump(), "gram_source": source}
    changed["search"] = recipe.search.model_copy(update={"anchors": []}).model_dump()
    return Recipe.parse(changed, "study")


def _point(session: Session, trial: Trial, cell: Cell, x: float) -> Point:
    test = {
        number: session.objective_of(scores, "test") for number, scores in (session.study.fact("test") or {}).items()
    }
    by_kind = {t.kind: t for t in session.study.trials(["finished"]) if t.kind != "proposed"}
    return Point(
        cell.anchor,
        cell.source,
        cell.seed,
        x,
        float(trial.value or 0.0),
        test[str(trial.number)],
        test[str(by_kind["default"].number)],
        test[str(by_kind["anchor"].number)],
    )


def summary(points: Sequence[Point]) -> list[dict[str, Any]]:
    """For each anchor, source and place of the axis the mean and standard deviation over the seeds, in shares of the experts' scores."""
    keys = sorted({(p.anchor, p.source, p.x) for p in points})
    rows = []
    for anchor, source, x in keys:
        own = [p for p in points if (p.anchor, p.source, p.x) == (anchor, source, x)]
        row: dict[str, Any] = {"anchor": anchor, "source": source, "x": x, "seeds": len(own)}
        for name in ("validation", "test", "default_test", "anchor_test"):
            values = [getattr(p, name) for p in own]
            row[name] = statistics.fmean(values)
            row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    return rows

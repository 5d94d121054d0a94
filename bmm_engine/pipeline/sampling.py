"""Several draws from the posterior of a recipe's merge: as checkpoints, or averaged and judged beside the MAP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from bmm_engine.checkpoint.provenance import is_merge_directory
from bmm_engine.errors import ConfigError, OutputExistsError, shown
from bmm_engine.pipeline.models import open_models
from bmm_engine.pipeline.run import PreparedMerge, check_output, prepare_recipe
from bmm_engine.pipeline.tasks import RecipeTasks, evaluation_of, task_names
from bmm_engine.progress import Report
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.solving.posterior import DEFAULT_TEMPERATURE, Posterior

if TYPE_CHECKING:
    from rich.table import Table

    from bmm_engine.evaluators.scores import Score
    from bmm_engine.pipeline.live import LiveModels

CLASSIFICATION = ("text_classification", "image_classification")
# What a comparison shows beside the metric, by the names in `Score.details`; lower is better.
CALIBRATION = ("nll", "expected_calibration_error")


class Classifier(Protocol):
    """What is needed of an evaluator: class probabilities, so that those of several models can be averaged before they are scored."""

    tasks: tuple[str, ...]

    def probabilities(self, model: nn.Module, task: str) -> Tensor:
        """(samples, classes) float32 on the CPU."""
        ...

    def score(self, probabilities: Tensor, task: str) -> Score: ...


@dataclass(frozen=True)
class TaskComparison:
    """One task, scored by the MAP and by the mean of the draws' class probabilities."""

    task: str
    map: Score
    average: Score


@dataclass(frozen=True)
class SampleEvaluation:
    """`count` draws of the series `seed` at `temperature`, judged on `split`."""

    split: str
    count: int
    seed: int
    temperature: float
    tasks: list[TaskComparison]

    def rows(self) -> list[dict[str, Any]]:
        """Plain values, two rows a task: `model` is "MAP" or "average"; metric, value, low, high, samples, and each of `CALIBRATION`."""
        return [
            {
                "task": own.task,
                "model": model,
                "metric": score.metric,
                "value": score.value,
                "low": score.low,
                "high": score.high,
                "samples": score.samples,
                **{key: score.details[key] for key in CALIBRATION},
            }
            for own in self.tasks
            for model, score in (("MAP", own.map), ("average", own.average))
        ]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        chosen = {"split": self.split, "count": self.count, "seed": self.seed, "temperature": self.temperature}
        return {**chosen, "rows": self.rows()}


def prepare_samples(recipe: Recipe, **options: Any) -> PreparedMerge:
    """As `prepare_recipe`, of a merge that has a posterior: all outputs count alike."""
    return prepare_recipe(recipe.model_copy(update={"output_weights": "none"}), **options)


def draw(
    recipe: Recipe,
    count: int,
    *,
    output: Path,
    seed: int = 0,
    temperature: float = DEFAULT_TEMPERATURE,
    first: int = 0,
    overwrite: bool = False,
    local_files_only: bool = False,
    progress: bool | None = None,
    report: Report = lambda line: None,
    prepared: PreparedMerge | None = None,
) -> list[Path]:
    """Write `count` draws from the posterior, `output`/sample-FIRST and on, each a checkpoint of its own.

    What is missing (Grams) is measured once. Draw i is the same however many are drawn, so a run that was stopped goes on with `first`.
    `prepared`: the recipe's, where it is at hand. Raises `OutputExistsError` if any of them exists (unless `overwrite`) before anything is
    computed, `ConfigError` for a recipe whose modules all come from the anchor, and what a merge raises.
    """
    draws = check_draws(
        recipe, count, output=output, seed=seed, temperature=temperature, first=first, overwrite=overwrite
    )
    prepared = prepared or prepare_samples(recipe, local_files_only=local_files_only, progress=progress, report=report)
    for path, posterior in draws.items():
        prepared.merge(path, overwrite=overwrite, posterior=posterior)
        report(f"{path}: draw {posterior.index} of seed {seed}, temperature {temperature:g}")
    return list(draws)


def check_draws(
    recipe: Recipe, count: int, *, output: Path, seed: int, temperature: float, first: int = 0, overwrite: bool = False
) -> dict[Path, Posterior]:
    """Where `draw` would write what. Raises as it does, for all that can be told before a model runs."""
    if is_merge_directory(output):
        raise OutputExistsError(f"{output}: is itself a merged checkpoint; draws go into a directory of their own.")
    draws = {output / f"sample-{p.index}": p for p in _series(recipe, count, seed, temperature, first)}
    for path in draws:
        check_output(path, overwrite)
    return draws


def evaluate_samples(
    recipe: Recipe,
    count: int,
    *,
    seed: int = 0,
    temperature: float = DEFAULT_TEMPERATURE,
    split: str | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
    report: Report = lambda line: None,
    prepared: PreparedMerge | None = None,
) -> SampleEvaluation:
    """Score the MAP, and the mean of the class probabilities of `count` draws, on the recipe's labelled files.

    `split`: "validation" or "test"; by default "test" where every expert has such a file. Draws are those that `draw` would write, in memory one
    after another. Raises `ConfigError` unless the recipe has an `evaluation` of classification and data for the split.
    """
    draws = _series(recipe, count, seed, temperature)
    split = check_evaluation(recipe, split)
    models = prepared.models if prepared is not None else open_models(recipe, local_files_only)
    tasks = RecipeTasks(recipe, models)
    evaluator: Any = tasks.evaluator(split)
    prepared = prepared or prepare_samples(recipe, models=models, progress=progress, report=report)
    best = prepared.merge()
    live = tasks.live(best.plan, recipe.device)
    compared = compare(evaluator, live, best.tensors or {}, (prepared.merge(posterior=p).tensors or {} for p in draws))
    return SampleEvaluation(split, count, seed, temperature, compared)


def check_evaluation(recipe: Recipe, split: str | None) -> str:
    """The split that `evaluate_samples` would judge on. Raises `ConfigError` as it does, for all that the recipe tells."""
    experts, names, kind = recipe.experts, task_names(recipe), evaluation_of(recipe).kind
    if kind not in CLASSIFICATION:
        raise ConfigError(
            f"draws are averaged by their class probabilities, which an evaluation of kind {kind!r} does not have; they can be judged"
            f" with {' or '.join(CLASSIFICATION)}."
        )
    if len(set(names)) != len(experts):
        raise ConfigError(f"the experts' names are not all different ({', '.join(names)}); give each a `name`.")
    split = split or ("test" if all(e.test is not None for e in experts) else "validation")
    if split not in ("validation", "test"):
        raise ConfigError(f"split must be 'validation' or 'test', not {split!r}.")
    lacking = [e.label for e in experts if getattr(e, split) is None]
    if lacking:
        raise ConfigError(f"expert {shown(lacking[0])} has no `{split}` file to judge draws on; give every expert one.")
    return split


def compare(
    evaluator: Classifier,
    live: LiveModels,
    best: Mapping[str, Tensor],
    draws: Iterable[Mapping[str, Tensor]],
) -> list[TaskComparison]:
    """The MAP's tensors `best`, and those of each draw (base tensor name -> tensor), written into the live models one after another.

    The draws' probabilities are averaged in float64. Raises `ConfigError` where there are no draws.
    """

    def probabilities(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        live.load(tensors)
        return {task: evaluator.probabilities(live.models[task], task) for task in evaluator.tasks}

    own = probabilities(best)
    totals = {task: torch.zeros_like(p, dtype=torch.float64) for task, p in own.items()}
    count = 0
    for tensors in draws:
        count += 1
        for task, found in probabilities(tensors).items():
            totals[task] += found
    if not count:
        raise ConfigError("there are no draws to average.")
    return [
        TaskComparison(task, evaluator.score(own[task], task), evaluator.score((totals[task] / count).float(), task))
        for task in evaluator.tasks
    ]


def render(evaluation: SampleEvaluation) -> Table:
    """The comparison as a table: each task's metric in percent with its 95 % interval, negative log-likelihood, and calibration error."""
    from rich.table import Table

    title = f"{evaluation.count} draws at temperature {evaluation.temperature:g}, {evaluation.split} set"
    table = Table("task", "", "metric", title=title, caption="ECE: expected calibration error, in percent")
    for column in ("% (95 % interval)", "NLL", "ECE"):
        table.add_column(column, justify="right")
    rows = evaluation.rows()
    for row in rows:
        value = f"{100 * row['value']:.2f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
        _add(table, row["task"], row, value, end=row["model"] == "average")
    for model in ("MAP", "average") if len(evaluation.tasks) > 1 else ():
        own = [row for row in rows if row["model"] == model]
        mean = {key: sum(row[key] for row in own) / len(own) for key in ("value", *CALIBRATION)}
        _add(table, "mean", {**mean, "model": model, "metric": ""}, f"{100 * mean['value']:.2f}")
    return table


def _add(table: Table, task: str, row: Mapping[str, Any], value: str, end: bool = False) -> None:
    nll, error = (row[key] for key in CALIBRATION)
    table.add_row(task, row["model"], row["metric"], value, f"{nll:.4f}", f"{100 * error:.2f}", end_section=end)


def _series(recipe: Recipe, count: int, seed: int, temperature: float, first: int = 0) -> list[Posterior]:
    if count < 1:
        raise ConfigError(f"the number of draws must be at least 1, not {count}.")
    if recipe.mode == "sequential":
        raise ConfigError(
            "draws from the posterior are for mode 'plain': in mode 'sequential' every module's inputs depend on the modules before it. Set"
            " mode: plain."
        )
    if recipe.output_weights not in (None, "none"):
        raise ConfigError("draws from the posterior are for outputs that count alike: set output_weights: none.")
    recipe.settings.check_posterior()
    if not recipe.settings.solves:
        raise ConfigError("alpha is inf, so every module is the anchor's and has no posterior; give a finite alpha.")
    return [Posterior(seed, index, temperature) for index in range(first, first + count)]

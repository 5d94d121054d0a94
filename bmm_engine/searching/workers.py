"""What workers of a search run, and how they come by what it needs: functions and values that travel between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmm_engine.anchors import get_anchor
from bmm_engine.anchors.contract import GRAMS, Needs
from bmm_engine.errors import ConfigError
from bmm_engine.evaluators.contract import Evaluator
from bmm_engine.evaluators.scores import Score
from bmm_engine.executors import Executor, Shared, WorkerInfo, run_all
from bmm_engine.merging.factors import FactorGroup, FactorMaker, Factors
from bmm_engine.merging.sources import Models
from bmm_engine.parallel import in_order, share_of_memory
from bmm_engine.pipeline.measure import collect_from_checkpoint
from bmm_engine.pipeline.models import open_models
from bmm_engine.pipeline.statistics import calibration_batches, expert_data, sensitivity_sets, with_output_weights
from bmm_engine.pipeline.tasks import RecipeTasks
from bmm_engine.progress import Report
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.searching.problem import Problem, Tasks, anchor_choices
from bmm_engine.searching.sequential_trial import SequentialWriter
from bmm_engine.searching.space import Candidate
from bmm_engine.searching.trial import Bar, CandidateWriter, FreeWriter, Outcome, TrialRunner, Writer
from bmm_engine.statistics.sets import Statistics

Opener = Callable[[], Problem]


@dataclass(frozen=True)
class RecipeProblem:
    """Opens a recipe's problem, wherever it is called; all Grams must be measured. `models`: the recipe's, where they are open; they stay in this
    process."""

    recipe: Recipe
    local_files_only: bool = False
    models: Models | None = None

    def __call__(self) -> Problem:
        recipe = self.recipe
        models = self.models or open_models(recipe, self.local_files_only)
        return Problem(
            models=models,
            settings=recipe.settings,
            statistics=Statistics.open(
                [str(e.grams) for e in recipe.experts] if wants_grams(recipe) else None,
                [e.fisher for e in recipe.experts if e.fisher is not None],
                anchor_sensitivities=[e.sensitivity for e in recipe.experts if e.sensitivity is not None]
                if "sensitivities" in anchor_needs(recipe)
                else (),
            ),
            tasks=RecipeTasks(recipe, models),
            search=recipe.search,
            anchors=anchor_choices(recipe),
            walk=partial(measure_walk, recipe, models) if recipe.mode == "sequential" else None,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return RecipeProblem, (self.recipe, self.local_files_only)


def measure_walk(recipe: Recipe, models: Models) -> Statistics:
    """What the trials of a search need to walk: calibration batches, and sensitivities unless all outputs count alike."""
    weighted = recipe.output_weights == "sensitivity"
    weights = sensitivity_sets(recipe, models, report=lambda line: None, progress=False) if weighted else []
    return Statistics(
        sensitivities=tuple(weights),
        batches=tuple(calibration_batches(recipe, models)),
        task_vectors_weigh=recipe.output_weights == "task_vectors",
    )


def wants_grams(recipe: Recipe) -> bool:
    """Does a search need measured Grams? In the mode sequential only for anchors that do."""
    if recipe.mode == "plain":
        return recipe.gram_source != "task_vectors"
    return bool(anchor_needs(recipe) & GRAMS)


def anchor_needs(recipe: Recipe) -> Needs:
    """What the anchors that a search chooses from read beside the weights."""
    choices = anchor_choices(recipe).values()
    return frozenset(need for rule, parameters in choices for need in get_anchor(rule).needs_of(parameters))


# The search factors each group once for all its trials; with metrics every solve is iterative, and has no such factor.
NO_WEIGHTED_PLAIN_SEARCH = (
    "a search in the mode plain weighs all outputs alike: leave out the sensitivities (a recipe: output_weights: none), or search in the mode"
    " sequential."
)


def with_search_weights(recipe: Recipe, models: Models, report: Report) -> Recipe:
    """The recipe with `output_weights` chosen, where it leaves them open. Raises `ConfigError` for those that a search cannot have, and for a place
    where what they need may not be written."""
    if recipe.mode == "sequential":
        chosen = with_output_weights(recipe, models, report)
        if chosen.output_weights == "sensitivity":
            chosen.check_writable("sensitivity")
        return chosen
    if recipe.output_weights not in (None, "none"):
        raise ConfigError(NO_WEIGHTED_PLAIN_SEARCH)
    return recipe.model_copy(update={"output_weights": "none"})


# Grams


def collect_grams_of(state: Any, recipe: Recipe, index: int, path: str, local_files_only: bool, device: str) -> str:
    """Measure one expert's Grams and save them at `path`; returns what they were measured on."""
    expert, options = recipe.experts[index], recipe.calibration
    models = open_models(recipe.model_copy(update={"experts": [expert]}), local_files_only)
    (source,) = models.experts
    data = expert_data(recipe, expert, source, models.base)
    grams = collect_from_checkpoint(source, data, options, modules=recipe.modules, device=device, progress=False)
    grams.save(path)
    return data.describe()


def with_grams(recipe: Recipe, folder: Path, executor: Executor, local_files_only: bool, report: Report) -> Recipe:
    """The recipe with a Gram file for every expert: those that are lacking are measured, one expert for each worker, and kept in `folder`."""
    if not wants_grams(recipe):
        return recipe
    recipe.check_writable("grams")
    experts = [
        e if e.grams is not None else e.model_copy(update={"grams": str(folder / "grams" / f"{i}.safetensors")})
        for i, e in enumerate(recipe.experts)
    ]
    missing = [i for i, e in enumerate(experts) if not Path(str(e.grams)).exists()]
    for i in missing:
        if experts[i].calibration is None:
            raise ConfigError(
                f"expert {experts[i].label!r}: its Gram file {experts[i].grams!r} does not exist, and no `calibration` says how to make it."
            )
    if missing:
        executor.start(no_state)
        calls = [(recipe, i, str(experts[i].grams), local_files_only, recipe.device) for i in missing]
        described = run_all(executor, collect_grams_of, calls, label="collecting Grams")
        for i, text in zip(missing, described, strict=True):
            report(f"{experts[i].label}: Grams collected from {text}")
    return recipe.model_copy(update={"experts": experts})


# Factors


def open_maker(info: WorkerInfo, opener: Opener, anchors: Shared) -> FactorMaker:
    problem = opener()
    settings = problem.plan.settings
    plan = replace(problem.plan, settings=settings.but(device=info.device(settings.device)))
    found: dict[str, dict[str, Tensor]] = {label: {} for label in problem.anchors}
    for name, tensor in anchors.tensors().items():
        _, label, own = name.split(" ", 2)
        found[label][own] = tensor
    return FactorMaker(plan, found, problem.weightings)


def make_group(maker: FactorMaker, index: int) -> tuple[FactorGroup, dict[str, Tensor]]:
    return maker.group(index)


def make_factors(executor: Executor, opener: Opener, problem: Problem, anchors: Shared) -> list[Any]:
    """The factors of every group, each by one worker (here: each by one thread), so that no bit depends on how many there are."""
    count = len(problem.plan.groups)
    if executor.workers > 1:
        executor.start(open_maker, opener, anchors)
        return run_all(executor, make_group, [(index,) for index in range(count)], label="factoring")
    maker = open_maker(WorkerInfo(0, 1), lambda: problem, anchors)
    widths = [group.width + group.with_bias for group in problem.plan.groups]
    heights = [sum(m.out_features for m in group.members) for group in problem.plan.groups]
    held = [8 * (5 * w * w + 3 * w * h * len(problem.anchors)) for w, h in zip(widths, heights, strict=True)]
    tasks = ((size, partial(maker.group, index)) for index, size in enumerate(held))
    return list(in_order(tasks, workers=torch.get_num_threads(), most_bytes=share_of_memory()))


# Trials


def open_runner(
    info: WorkerInfo,
    opener: Opener,
    groups: Sequence[FactorGroup],
    shared: Shared,
    split: str,
    device: str,
    tick: Callable[[], None] | None = None,
) -> TrialRunner:
    """Live models, factors on their device, prepared data: what trials need, once for each worker."""
    problem, device = opener(), info.device(device)
    live = problem.tasks.live(problem.plan, device)
    tensors: Mapping[str, Tensor] = shared.tensors()
    if device != "cpu":
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    factors = Factors(groups, tensors, problem.settings.spectral_filter)
    evaluator = problem.tasks.evaluator(split)
    if evaluator is None:
        raise AssertionError(f"no data for {split}")
    writer: CandidateWriter
    if problem.walk is not None:
        writer = SequentialWriter(problem, live, factors, device)
    elif not problem.space.free_tasks:
        writer = Writer(live, factors, problem.groups)
    else:
        plan = replace(problem.plan, settings=problem.plan.settings.but(device=device))
        writer = FreeWriter(plan, live, factors, problem.groups)
    runner = TrialRunner(live, writer, evaluator, problem.goal)
    if tick is not None:
        runner.tick = tick
    return runner


def run_trial(runner: TrialRunner, plain: Mapping[str, Any], bar: Bar | None) -> Outcome:
    return runner.run(Candidate.from_plain(plain), bar)


def no_state(info: WorkerInfo) -> None:
    """Of workers whose jobs need nothing."""


@dataclass(frozen=True)
class Judge:
    """What scoring experts needs: the tasks, and their evaluator, or None where there is no data for a split."""

    tasks: Tasks
    evaluator: Evaluator | None
    device: str


def open_judge(info: WorkerInfo, opener: Opener, split: str, device: str) -> Judge:
    tasks = opener().tasks
    return Judge(tasks, tasks.evaluator(split), info.device(device))


def score_expert(judge: Judge, index: int) -> dict[str, Score]:
    """One expert's own scores; {} where there is nothing to score by."""
    return {} if judge.evaluator is None else judge.tasks.expert_scores(index, judge.evaluator, judge.device)

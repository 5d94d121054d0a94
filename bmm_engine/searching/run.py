"""A search from end to end: measure, factor, search, judge on the test data, write the best recipe, merge."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bmm_engine.anchors import get_anchor
from bmm_engine.checkpoint import RECORD_FILENAME, merge_record
from bmm_engine.checkpoint.identity import values_digest
from bmm_engine.checkpoint.ownership import record_digest
from bmm_engine.checkpoint.provenance import RECORD_FORMAT
from bmm_engine.disk.files import foreign, matches, named, read_identity
from bmm_engine.errors import ConfigError, OutputExistsError, SearchError
from bmm_engine.executors import open_executor
from bmm_engine.executors.devices import check_device
from bmm_engine.merging.sources import Model, Models
from bmm_engine.models.roles import Layers, module_role
from bmm_engine.pipeline.models import open_models
from bmm_engine.pipeline.run import check_output, run_recipe
from bmm_engine.pipeline.tasks import check_tasks
from bmm_engine.progress import Report
from bmm_engine.recipe.explain import parse_section, unknown_key
from bmm_engine.recipe.keywords import keywords_of, settings_of
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.sections import SearchRecipe
from bmm_engine.searching.best import best_recipe, write_recipe
from bmm_engine.searching.driver import Watcher
from bmm_engine.searching.identity import identity_of, models_of, versions
from bmm_engine.searching.objective import get_objective, objective_name
from bmm_engine.searching.problem import FunctionTasks, Problem
from bmm_engine.searching.proposer import check_optimizer
from bmm_engine.searching.schema import Trial
from bmm_engine.searching.session import Session
from bmm_engine.searching.space import Candidate
from bmm_engine.searching.study import DATABASE, Study
from bmm_engine.searching.view import Silent
from bmm_engine.searching.workers import NO_WEIGHTED_PLAIN_SEARCH, RecipeProblem, with_grams, with_search_weights
from bmm_engine.solving.weighted import check_filter
from bmm_engine.statistics.sets import Fishers, Grams, Sensitivities, Statistics
from bmm_engine.statistics.text_file import check_output_path

_WRITING = "writing"  # the fact that says where the best merge is being written
_is_before_a_study = matches(
    r"lock|grams/(\.?\d+\.safetensors(\..+\.partial)?)?|\.trials\.sqlite\..+|\.shared-[^/]+/.*"
)


@dataclass(frozen=True)
class SearchResult:
    """`best` trial and the `candidate` it ran, as arguments of `merge`; the study's folder; what was written.

    `rows`: experts, anchor, default and best, each with its objective and its scores by task, on validation and, where there is one, on the test
    set. `tensors`: of a search in memory, the merged model by the base's names.
    """

    best: Trial
    candidate: Candidate
    arguments: dict[str, Any]
    rows: list[dict[str, Any]]
    trials: int
    seconds: float
    study: Path | None = None
    recipe: Path | None = None
    output: Path | None = None
    tensors: dict[str, Tensor] | None = None


def study_folder(output: Path) -> Path:
    """Where the study of a merge lies: beside it."""
    return output.with_name(f"{output.name}.study")


def search_recipe(
    recipe: Recipe,
    output: Path,
    *,
    workers: int = 0,
    ray: str | None = None,
    overwrite: bool = False,
    write_merge: bool = True,
    local_files_only: bool = False,
    watcher: Watcher | None = None,
    report: Report = lambda line: None,
) -> SearchResult:
    """Search a recipe's outer level; the study goes into `output` + ".study", the merge of the best candidate into `output`.

    Called again with the same recipe, it goes on where it stopped, however it was stopped; a larger budget continues a finished study.
    Raises `ConfigError` (a wrong recipe, another study in the place), `StudyBusyError`, `SearchError`, and what a merge raises.
    """
    check_device(recipe.device)
    check_optimizer(recipe.search.optimizer)
    get_objective(recipe.search.objective)
    check_output_path(output)
    output = output.resolve()
    folder = study_folder(output)
    check_study_folder(folder)
    taken, begun = _own_result(folder, output)
    if write_merge:
        check_output(output, overwrite or taken or begun)
    check_tasks(recipe)
    models = open_models(recipe, local_files_only)
    recipe = with_search_weights(recipe, models, report)
    with ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        executor = stack.enter_context(open_executor(workers, ray, folder=folder))
        identity = identity_of(recipe, models, executor.workers)
        measured = with_grams(recipe, folder, executor, local_files_only, report)
        opener = RecipeProblem(measured, local_files_only, models)
        problem = opener()
        study = stack.enter_context(open_study(folder, problem, identity, recipe))
        stack.enter_context(study.drive())
        session = Session(problem, opener, study, executor, recipe.device, watcher or Silent(), report)
        best = session.run()
        rows = session.rows(best)
        candidate = Candidate.from_plain(best.parameters)
        chosen = best_recipe(measured, problem, candidate)
        path = write_recipe(chosen, folder / "best.yaml")
        written = None
        if write_merge:
            replaced = overwrite or taken or (begun and _is_merge_of(chosen, output))
            study.set_fact(_WRITING, str(output))
            written = run_recipe(chosen, output, overwrite=replaced, models=models, report=report).path
        session.finish(best, output if write_merge else None)
        study.set_fact(_WRITING, None)
        return SearchResult(
            best,
            candidate,
            problem.settings_of(candidate),
            rows,
            len(study.trials()),
            session.seconds,
            study=folder,
            recipe=path,
            output=written,
        )


def search(
    base: Model,
    experts: Sequence[Model],
    evaluate: Callable[[nn.Module, str], Any],
    *,
    tasks: Sequence[str] | None = None,
    expert_scores: Mapping[str, float] | None = None,
    grams: Grams = "task_vectors",
    fishers: Fishers = (),
    batches: Sequence[Iterable[Any]] | None = None,
    sequential: Mapping[str, Any] | None = None,
    sensitivities: Sensitivities = (),
    anchors: Sequence[str] = (),
    objective: str | Callable[[Mapping[str, float]], float] = "mean",
    study: Path | str | None = None,
    watcher: Watcher | None = None,
    **options: Any,
) -> SearchResult:
    """The outer level on live models: which ridge of each group of modules, scale and anchor are best on validation data.

    `base`: a live model; `experts`: live models (or state dicts or paths, with `expert_scores`). `evaluate(model, task)` returns a number, higher is
    better, or a `Score`; it gets a live copy of the base with a candidate's weights. `tasks`: names, by default one for each expert, and task i
    is then expert i's. `batches`: each expert's calibration data, for the mode sequential, in which every trial walks through the network (see
    `merge_sequential`; `sequential`: its `fit_bias`, `target`, `mean_weight`, `norms`, `sweeps`, `blocks`, ...; `sensitivities` as there). Anchors
    that need `sensitivities` have them in either mode. The objective is over score / expert's score. `anchors`: rules to choose from. `options`:
    settings of `merge` (anchor, alpha, scale, task_weights, modules, keep_base, device, ...), and of the recipe's section `search` (trials, minutes,
    seed, optimizer, groups, depth_bins, ...). `study`: a folder to keep and resume the trials in.
    Raises `ConfigError`, `SearchError`, and what `merge` raises.
    """
    if not isinstance(base, nn.Module):
        raise ConfigError(
            "search needs the base as a live model to evaluate; for checkpoints write a recipe and call search_recipe."
        )
    names = tuple(tasks) if tasks is not None else tuple(f"task {i}" for i in range(len(experts)))
    function = get_objective(objective)
    known = keywords_of("plain")
    for key in options:
        if key not in known and key not in SearchRecipe.model_fields:
            raise ConfigError(f"search: {unknown_key(key, [*known, *SearchRecipe.model_fields])}")
    raw = {key: value for key, value in options.items() if key not in known}
    section = parse_section(SearchRecipe, {"anchors": list(anchors), "objective": "mean", **raw}, "search")
    check_optimizer(section.optimizer)
    algebra = {"task_weights": None, **{key: value for key, value in options.items() if key in known}}
    by_task_vectors = isinstance(sensitivities, str)
    measured = Statistics.open(None, (), sensitivities, batches or ())
    statistics = Statistics.open(grams, fishers, anchor_sensitivities=measured.sensitivities)
    if batches is None:
        source = "data" if statistics.grams else "task_vectors"
        settings, walk = settings_of("plain", algebra, gram_source=source), None
    else:
        settings, walk = settings_of("sequential", {**algebra, **(sequential or {})}), lambda: measured
        if sensitivities:
            check_filter(settings.spectral_filter)
    check_device(settings.device)
    parameters = {settings.anchor: settings.anchor_parameters}
    choices = {name: (name, parameters.get(name, {})) for name in (anchors or [settings.anchor])}
    of_anchors = any("sensitivities" in get_anchor(rule).needs_of(own) for rule, own in choices.values())
    if sensitivities and batches is None and (by_task_vectors or not of_anchors):
        raise ConfigError(NO_WEIGHTED_PLAIN_SEARCH)
    problem = Problem(
        Models.open(base, experts),
        settings,
        statistics,
        FunctionTasks(base, [e if isinstance(e, nn.Module) else None for e in experts], names, evaluate, expert_scores),
        section,
        choices,
        function,
        walk,
    )
    with ExitStack() as stack:
        folder = study if study is not None else stack.enter_context(tempfile.TemporaryDirectory(prefix="bmm-search-"))
        study_path = Path(folder)
        executor = stack.enter_context(open_executor(0))
        identity = {
            "search": {
                **section.model_dump(exclude={"trials", "minutes", "lead"}),
                "objective": objective_name(objective),
            },
            "tasks": list(names),
            "anchors": {label: [rule, repr(own)] for label, (rule, own) in problem.anchors.items()},
            "settings": settings.plain(),
            "models": models_of(problem),
            "sequential": None
            if walk is None
            else [
                *map(values_digest, measured.batches),
                *(own.digest() for own in measured.sensitivities),
                *(["task_vectors"] if measured.task_vectors_weigh else []),
            ],
        }
        kept = stack.enter_context(open_study(study_path, problem, identity, None))
        stack.enter_context(kept.drive())
        session = Session(
            problem, lambda: problem, kept, executor, settings.device, watcher or Silent(), lambda line: None
        )
        best = session.run()
        candidate = Candidate.from_plain(best.parameters)
        arguments = problem.settings_of(candidate)
        merged = problem.merge(candidate)
        session.finish(best, None)
        return SearchResult(
            best,
            candidate,
            arguments,
            session.rows(best),
            len(kept.trials()),
            session.seconds,
            study=None if study is None else study_path,
            tensors=merged,
        )


def open_study(folder: Path, problem: Problem, identity: Mapping[str, Any], recipe: Recipe | None) -> Study:
    """The study in a folder, made if there is none. Raises `ConfigError` where it is another search's."""
    layers, options = Layers(problem.modules), problem.search
    group_of = {module: group.name for group in problem.groups for module in group.modules}
    record = {
        "identity": dict(identity),
        "recipe": None if recipe is None else recipe.plain(),
        "tasks": list(problem.tasks.names),
        "anchors": list(problem.anchors),
        "objective": problem.goal.name,
        "optimizer": options.optimizer,
        "seed": options.seed,
        "budget": {"trials": options.trials, "minutes": options.minutes},
        "groups": [
            {"name": g.name, "role": g.role, "depth": g.depth, "modules": list(g.modules)} for g in problem.groups
        ],
        "modules": {m: {"role": module_role(m), "layer": layers(m), "group": group_of[m]} for m in problem.modules},
        "versions": versions(),
    }
    return Study.open_or_create(folder, record)


def check_study_folder(folder: Path) -> None:
    """Refuse a folder that holds something, but no study nor what a search measures before there is one. Raises `OutputExistsError`."""
    if not folder.is_dir() or (folder / DATABASE).exists():
        return
    if theirs := foreign(folder, _is_before_a_study):
        raise OutputExistsError(
            f"{folder}: holds no study, but {named(theirs)}; a search keeps its study under this name. Move it elsewhere, or choose another output."
        )


def _own_result(folder: Path, output: Path) -> tuple[bool, bool]:
    """Was the merge at `output` written by the study in `folder`? And if that is not known, for the search was killed then: was it about to be?"""
    if not (folder / DATABASE).exists() or not output.exists():
        return False, False
    with Study.open(folder, readonly=True) as study:
        result, writing = study.fact("result") or {}, study.fact(_WRITING)
    place = str(output.resolve())
    own = result.get("output") == place and result.get("record") in (None, record_digest(output))
    return own, writing == place


def _is_merge_of(recipe: Recipe, output: Path) -> bool:
    """Is the merge at `output` that of a recipe?"""
    record = read_identity(output / RECORD_FILENAME, RECORD_FORMAT) or {}
    return bool(record.get("recipe") == merge_record(recipe.plain(), [])["recipe"])


__all__ = ["SearchError", "SearchResult", "search", "search_recipe", "study_folder"]

"""A recipe from end to end: measure what is missing, plan, merge. What the command line runs, and what it prints comes from here."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bmm_engine.checkpoint.staging import StagedDirectory
from bmm_engine.checkpoint.tokenizer import check_same_tokenizer
from bmm_engine.errors import ConfigError
from bmm_engine.merging.merge import MergeResult, merge, plan_merge
from bmm_engine.merging.plan import MergePlan, MergeSettings, given_task_weights
from bmm_engine.pipeline.statistics import (
    Models,
    Report,
    calibration_batches,
    fisher_sets,
    gram_sets,
    sensitivity_sets,
    with_output_weights,
)
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.sequential.options import SequentialOptions
from bmm_engine.sequential.run import merge_sequential
from bmm_engine.solving.posterior import Posterior


def settings_of(recipe: Recipe) -> MergeSettings:
    """The part of a recipe that decides the algebra."""
    return MergeSettings(
        anchor=recipe.anchor.name,
        anchor_parameters=recipe.anchor_parameters,
        gram_source=recipe.gram_source or "task_vectors",
        hybrid_share=recipe.hybrid_share,
        normalization=recipe.normalization,
        alpha=recipe.alpha,
        scale=recipe.scale,
        task_weights=given_task_weights(recipe.task_weights),
        sensitivity_share=recipe.sensitivity_share,
        fit_bias=bool(recipe.fit_bias),
        device=recipe.device,
    )


def sequential_options(recipe: Recipe) -> SequentialOptions:
    """The part of a recipe that decides how the mode sequential walks. Raises `ConfigError`."""
    own = recipe.sequential.model_dump()
    return SequentialOptions(fit_bias=bool(recipe.fit_bias), walk_dtype=recipe.calibration.dtype, **own)


def plan_recipe(recipe: Recipe, *, local_files_only: bool = False) -> MergePlan:
    """What the recipe would do, from headers alone. While Grams are not collected, which modules share one is not known: the plan
    then lists modules one by one, as for a data-free merge (its `settings.gram_source` is "task_vectors"); so it does in the mode sequential.
    """
    settings = settings_of(recipe)
    paths = [e.grams for e in recipe.experts if e.grams is not None and Path(e.grams).exists()]
    ready = recipe.mode == "plain" and settings.gram_source != "task_vectors" and len(paths) == len(recipe.experts)
    if not ready:
        settings = replace(settings, gram_source="task_vectors", fit_bias=False)
    models = Models(local_files_only)
    if recipe.same_tokenizer:
        check_same_tokenizer(models.source(recipe.base), [models.expert(recipe, e) for e in recipe.experts])
    return plan_merge(
        models.get(recipe.base),
        [models.get(e.model) for e in recipe.experts],
        grams=paths if ready else "task_vectors",
        settings=settings,
        modules=recipe.modules,
        keep_base=recipe.keep_base,
        vocabulary=recipe.vocabulary,
        local_files_only=local_files_only,
    )


@dataclass(frozen=True)
class PreparedMerge:
    """A recipe whose statistics are at hand: `arguments` of `merge`, or of `merge_sequential`, to be used as often as wanted."""

    arguments: dict[str, Any]
    sequential: bool = False

    def merge(
        self, output: Path | None = None, *, overwrite: bool = False, posterior: Posterior | None = None
    ) -> MergeResult:
        """The merge, or a draw from its posterior: written to `output`, or in memory. Raises as `merge` or `merge_sequential`."""
        if not self.sequential:
            return merge(**self.arguments, output=output, overwrite=overwrite, posterior=posterior)
        if posterior is not None:
            raise ConfigError(
                "draws from the posterior are for mode 'plain': in mode 'sequential' every module's inputs depend on the modules before it."
            )
        return merge_sequential(**self.arguments, output=output, overwrite=overwrite)


def prepare_recipe(
    recipe: Recipe,
    *,
    local_files_only: bool = False,
    progress: bool | None = None,
    report: Report = lambda line: None,
) -> PreparedMerge:
    """Check a recipe against its models, and measure what is missing (Grams, Fisher information, sensitivities), once for all its merges."""
    settings = settings_of(recipe)
    plan_recipe(recipe, local_files_only=local_files_only)  # names and shapes, before any model runs
    recipe = with_output_weights(recipe, Models(local_files_only), report)
    sequential = recipe.mode == "sequential"
    wants_grams = settings.rule.needs_grams if sequential else settings.needs_grams
    measured = settings.gram_source != "task_vectors" and wants_grams
    rule, models = settings.rule, Models(local_files_only)
    grams = (
        gram_sets(recipe, models, report=report, sequential=rule.needs == "sequential_grams", progress=progress)
        if measured
        else "task_vectors"
    )
    fishers = fisher_sets(recipe, models, report=report, progress=progress) if rule.needs == "fishers" else []
    weighted = recipe.output_weights == "sensitivity" and settings.solves
    sensitivities = sensitivity_sets(recipe, models, report=report, progress=progress) if weighted else []
    common = {
        "base": models.get(recipe.base),
        "experts": [models.get(e.model) for e in recipe.experts],
        "anchor": settings.anchor,
        "anchor_parameters": settings.anchor_parameters,
        "grams": grams,
        "alpha": settings.alpha,
        "scale": settings.scale,
        "task_weights": settings.task_weights,
        "modules": recipe.modules,
        "keep_base": recipe.keep_base,
        "vocabulary": recipe.vocabulary,
        "fishers": fishers,
        "sensitivities": sensitivities,
        "sensitivity_share": settings.sensitivity_share,
        "dtype": recipe.dtype,
        "max_shard_size": recipe.max_shard_size,
        "device": recipe.device,
        "recipe": recipe.plain(),
        "local_files_only": local_files_only,
        "progress": progress,
    }
    if not sequential:
        plain = {
            "hybrid": settings.hybrid_share if measured and settings.gram_source == "hybrid" else None,
            "fit_bias": settings.fit_bias and measured,
            "normalization": settings.normalization,
        }
        return PreparedMerge({**common, **plain})
    options = sequential_options(recipe)
    walked = {f.name: getattr(options, f.name) for f in fields(options)}
    walked |= {"batches": calibration_batches(recipe, models, report), "report": report}
    return PreparedMerge({**common, **walked}, sequential=True)


def run_recipe(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    local_files_only: bool = False,
    progress: bool | None = None,
    report: Report = lambda line: None,
) -> MergeResult:
    """Carry out a recipe and write the merged checkpoint to `output`."""
    check_output(output, overwrite)
    prepared = prepare_recipe(recipe, local_files_only=local_files_only, progress=progress, report=report)
    return prepared.merge(output, overwrite=overwrite)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a taken destination before any model runs. Raises `OutputExistsError`, `OutputWriteError`."""
    StagedDirectory(output, overwrite=overwrite, needed_bytes=0)

"""A recipe from end to end: open its models, measure what is missing, merge. What the command line runs, and what it prints comes from here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bmm_engine.checkpoint.staging import StagedDirectory
from bmm_engine.checkpoint.tokenizer import check_same_tokenizer, chosen_template
from bmm_engine.errors import ConfigError
from bmm_engine.executors.devices import check_device
from bmm_engine.merging.merge import MergeResult, merge_models
from bmm_engine.merging.output import Destination
from bmm_engine.merging.plan import MergePlan, make_plan
from bmm_engine.merging.sources import Models
from bmm_engine.pipeline.mode import in_a_mode_that_works
from bmm_engine.pipeline.models import open_models
from bmm_engine.pipeline.statistics import check_files, measure, remeasuring, with_output_weights
from bmm_engine.progress import Report
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.settings import MergeSettings
from bmm_engine.sequential.again import Remeasure
from bmm_engine.sequential.run import check_walk, walk_models
from bmm_engine.solving.posterior import Posterior
from bmm_engine.statistics.sets import Statistics
from bmm_engine.statistics.text_file import check_output_path


def plan_recipe(recipe: Recipe, *, local_files_only: bool = False, models: Models | None = None) -> MergePlan:
    """What the recipe would do, from headers alone. While Grams are not collected, which modules share one is not known: the plan
    then lists modules one by one, as for a data-free merge (its `settings.gram_source` is "task_vectors"); so it does in the mode sequential.
    """
    models = models or open_models(recipe, local_files_only)
    if recipe.same_tokenizer:
        check_same_tokenizer(models.base, models.experts)
    settings = recipe.settings
    paths = [e.grams for e in recipe.experts if e.grams is not None and Path(e.grams).exists()]
    ready = recipe.mode == "plain" and settings.gram_source != "task_vectors" and len(paths) == len(recipe.experts)
    if not ready:
        settings = settings.but(gram_source="task_vectors", fit_bias=False)
    return make_plan(settings, models, Statistics.open(paths if ready else None))


@dataclass(frozen=True)
class PreparedMerge:
    """A recipe whose models are open and whose statistics are at hand, to be merged as often as wanted."""

    settings: MergeSettings
    models: Models
    statistics: Statistics
    destination: Destination
    progress: bool | None = None
    report: Report = lambda line: None
    remeasure: Remeasure | None = None

    def merge(
        self, output: Path | None = None, *, overwrite: bool = False, posterior: Posterior | None = None
    ) -> MergeResult:
        """The merge, or a draw from its posterior: written to `output`, or in memory. Raises as `merge` or `merge_sequential`."""
        destination = replace(self.destination, path=output, overwrite=overwrite)
        given = (self.settings, self.models, self.statistics, destination)
        if self.settings.mode == "plain":
            return merge_models(*given, posterior=posterior, progress=self.progress)
        if posterior is not None:
            raise ConfigError(
                "draws from the posterior are for mode 'plain': in mode 'sequential' every module's inputs depend on the modules before it."
            )
        return walk_models(*given, progress=self.progress, report=self.report, remeasure=self.remeasure)


def prepare_recipe(
    recipe: Recipe,
    *,
    local_files_only: bool = False,
    models: Models | None = None,
    progress: bool | None = None,
    report: Report = lambda line: None,
) -> PreparedMerge:
    """Check a recipe against its models, and measure what is missing (Grams, Fisher information, sensitivities), once for all its merges.
    `models`: the recipe's, where they are open."""
    check_device(recipe.device)
    models = models or open_models(recipe, local_files_only)
    plan = plan_recipe(recipe, models=models)  # names and shapes, before any model runs
    recipe = in_a_mode_that_works(recipe, models, plan, report)
    recipe = with_output_weights(recipe, models, report)
    check_files(recipe, plan)
    statistics = measure(recipe, models, report=report, progress=progress)
    settings = recipe.settings
    if settings.mode == "plain" and not statistics.grams:
        settings = settings.but(gram_source="task_vectors", fit_bias=False)
    template = chosen_template(recipe.chat_template, (models.base, *models.experts))
    destination = Destination(
        dtype=recipe.dtype, max_shard_size=recipe.max_shard_size, recipe=recipe.plain(), chat_template=template
    )
    again = remeasuring(recipe, models, plan.alignment, report, progress)
    return PreparedMerge(settings, models, statistics, destination, progress, report, again)


def run_recipe(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    local_files_only: bool = False,
    models: Models | None = None,
    progress: bool | None = None,
    report: Report = lambda line: None,
) -> MergeResult:
    """Carry out a recipe and write the merged checkpoint to `output`."""
    check_output(output, overwrite)
    if recipe.mode == "sequential":
        check_walk(output)
    prepared = prepare_recipe(
        recipe, local_files_only=local_files_only, models=models, progress=progress, report=report
    )
    return prepared.merge(output, overwrite=overwrite)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a taken destination, or one that cannot be, before any model runs. Raises `OutputExistsError`, `OutputWriteError`, `ConfigError`."""
    check_output_path(output)
    StagedDirectory(output, overwrite=overwrite, needed_bytes=0)

"""A recipe from end to end: open or collect the Grams, plan, merge. What the command line runs, and what it prints comes from here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bmm_engine.calibration import CalibrationData, read_calibration
from bmm_engine.checkpoint import Checkpoint
from bmm_engine.checkpoint.staging import StagedDirectory
from bmm_engine.errors import CheckpointError, ConfigError
from bmm_engine.grams import GramSet
from bmm_engine.merging import MergeResult, merge, plan_merge
from bmm_engine.plan import MergePlan, MergeSettings
from bmm_engine.progress import quiet_transformers
from bmm_engine.recipe import CalibrationRecipe, Recipe

Report = Callable[[str], None]


def collect_from_checkpoint(
    model: str,
    data: CalibrationData,
    options: CalibrationRecipe,
    *,
    modules: list[str] | None = None,
    device: str = "cpu",
    local_files_only: bool = False,
    progress: bool | None = None,
) -> GramSet:
    """Load a Hugging Face checkpoint (path or hub id) with its own architecture and measure its Grams on `data`.

    Raises `CheckpointError` for what transformers cannot load, and whatever `collect_grams` raises.
    """
    import torch

    from bmm_engine.architecture import load_config, model_class
    from bmm_engine.collect import collect_grams

    path = Checkpoint.open(
        model, local_files_only=local_files_only
    ).path  # refuses damaged files, names them, and fetches hub ids
    cls = model_class(load_config(path))
    try:
        with quiet_transformers():
            live = cls.from_pretrained(path, dtype=getattr(torch, options.dtype), local_files_only=True).to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: transformers cannot load it as {cls.__name__}: {error}") from error
    if live.get_output_embeddings() is not None:
        live.set_output_embeddings(
            torch.nn.Identity()
        )  # logits over a whole vocabulary are large, and nobody reads them
    batches = list(data.batches(path, batch_size=options.batch_size, max_length=options.max_length))
    return collect_grams(live, batches, modules=modules, calibration=data.describe(), progress=progress)


def gram_sets(
    recipe: Recipe, *, report: Report, local_files_only: bool = False, progress: bool | None = None
) -> list[GramSet]:
    """Each expert's Grams: from its file where it exists, else collected (and saved there if the recipe names a file)."""
    missing = [
        e for e in recipe.experts if e.calibration is None and not (e.grams is not None and Path(e.grams).exists())
    ]
    if missing:
        raise ConfigError(
            f"expert {missing[0].model!r}: its Gram file {missing[0].grams!r} does not exist, and no `calibration` says how to make it. Collect it"
            " first (`bmm collect`), or name its calibration data."
        )
    # All data is read before the first model runs, so that a wrong path is found at once.
    data = {
        i: read_calibration(Path(e.calibration), samples=recipe.calibration.samples, field=recipe.calibration.field)
        for i, e in enumerate(recipe.experts)
        if e.calibration is not None and not (e.grams is not None and Path(e.grams).exists())
    }
    sets = []
    for i, expert in enumerate(recipe.experts):
        if i not in data:
            sets.append(GramSet.load(str(expert.grams)))
            report(f"{recipe.expert_name(i)}: Grams from {expert.grams}")
            continue
        grams = collect_from_checkpoint(
            expert.model,
            data[i],
            recipe.calibration,
            modules=recipe.modules,
            device=recipe.device,
            local_files_only=local_files_only,
            progress=progress,
        )
        if expert.grams is not None:
            grams.save(expert.grams)
        report(f"{recipe.expert_name(i)}: Grams of {len(grams.modules)} modules collected from {data[i].describe()}")
        sets.append(grams)
    return sets


def settings_of(recipe: Recipe) -> MergeSettings:
    """The part of a recipe that decides the algebra."""
    return MergeSettings(
        anchor=recipe.anchor.name,
        anchor_parameters=recipe.anchor.parameters,
        gram_source=recipe.gram_source or "task_vectors",
        hybrid_share=recipe.hybrid_share,
        normalization=recipe.normalization,
        alpha=recipe.alpha,
        scale=recipe.scale,
        task_weights=recipe.task_weights if isinstance(recipe.task_weights, str) else tuple(recipe.task_weights),
        fit_bias=recipe.fit_bias,
        device=recipe.device,
    )


def plan_recipe(recipe: Recipe, *, local_files_only: bool = False) -> MergePlan:
    """What the recipe would do, from headers alone. While Grams are not collected, which modules share one is not known: the plan
    then lists modules one by one, as for a data-free merge (its `settings.gram_source` is "task_vectors").
    """
    from dataclasses import replace

    settings = settings_of(recipe)
    paths = [e.grams for e in recipe.experts if e.grams is not None and Path(e.grams).exists()]
    ready = settings.gram_source != "task_vectors" and len(paths) == len(recipe.experts)
    if not ready:
        settings = replace(settings, gram_source="task_vectors", fit_bias=False)
    return plan_merge(
        recipe.base,
        [e.model for e in recipe.experts],
        grams=paths if ready else "task_vectors",
        settings=settings,
        modules=recipe.modules,
        keep_base=recipe.keep_base,
        local_files_only=local_files_only,
    )


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
    settings = settings_of(recipe)
    StagedDirectory(output, overwrite=overwrite, needed_bytes=0)  # refuses a taken destination before any model runs
    plan_recipe(recipe, local_files_only=local_files_only)  # names and shapes too
    measured = settings.gram_source != "task_vectors" and settings.alpha != float("inf")
    grams = (
        gram_sets(recipe, report=report, local_files_only=local_files_only, progress=progress)
        if measured
        else "task_vectors"
    )
    return merge(
        recipe.base,
        [e.model for e in recipe.experts],
        anchor=settings.anchor,
        anchor_parameters=settings.anchor_parameters,
        grams=grams,
        hybrid=settings.hybrid_share if measured and settings.gram_source == "hybrid" else None,
        alpha=settings.alpha,
        scale=settings.scale,
        task_weights=settings.task_weights,
        fit_bias=settings.fit_bias and measured,
        normalization=settings.normalization,
        modules=recipe.modules,
        keep_base=recipe.keep_base,
        output=output,
        dtype=recipe.dtype,
        max_shard_size=recipe.max_shard_size,
        overwrite=overwrite,
        device=recipe.device,
        recipe=recipe.plain(),
        local_files_only=local_files_only,
        progress=progress,
    )

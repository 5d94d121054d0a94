"""What the experts of a recipe are measured for on their calibration data: Grams, Grams of a sequential walk, Fisher information, sensitivities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.anchors.contract import GRAMS
from bmm_engine.checkpoint import TensorSource
from bmm_engine.errors import ConfigError
from bmm_engine.merging.align import Alignment
from bmm_engine.merging.belonging import check_fishers, check_sensitivities, measured_modules
from bmm_engine.merging.plan import MergePlan
from bmm_engine.merging.sources import Models
from bmm_engine.models.architecture import nothing_to_solve
from bmm_engine.models.building import load_config, meta_model, model_class
from bmm_engine.models.fitted_inputs import needs_decoder_inputs
from bmm_engine.models.heads import head_parameters
from bmm_engine.pipeline.live import share_parameters
from bmm_engine.pipeline.measure import (
    batches_of,
    collect_from_checkpoint,
    fisher_from_checkpoint,
    sensitivity_from_checkpoint,
)
from bmm_engine.pipeline.models import held_by, live_model, model_folder, preparing_folder
from bmm_engine.progress import Report
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.references import ExpertRecipe
from bmm_engine.recipe.settings import MergeSettings
from bmm_engine.sequential.again import Remeasure
from bmm_engine.solving.agreement import SHRINKAGE
from bmm_engine.statistics.calibration import CalibrationData, read_calibration
from bmm_engine.statistics.fisher import FisherSet
from bmm_engine.statistics.grams import GramSet
from bmm_engine.statistics.sensitivity import SensitivitySet
from bmm_engine.statistics.sequential_grams import collect_sequential
from bmm_engine.statistics.sets import Statistics

# Of a task: below, a plain merge on hybrid Grams can be better (bench/README.md, "How much calibration data").
FEW_SAMPLES = 16


def measure(
    recipe: Recipe, models: Models, *, report: Report = lambda line: None, progress: bool | None = None
) -> Statistics:
    """All that the merge of a recipe needs beside its models (its `output_weights` chosen), read from files or measured now.

    Where it is kept is checked before anything is measured. Raises `ConfigError`, and what measuring raises.
    """
    settings = recipe.settings
    sequential, needs = recipe.mode == "sequential", settings.anchor_needs
    wants_grams = _wants_grams(recipe, settings)
    weighted = recipe.output_weights == "sensitivity" and settings.solves
    together = "sequential_grams" in needs
    if wants_grams:
        check_gram_places(recipe, together)
    if "fishers" in needs:
        recipe.check_writable("fisher")
    if weighted or "sensitivities" in needs:
        recipe.check_writable("sensitivity")
    grams: list[GramSet] = []
    if wants_grams:
        grams = gram_sets(recipe, models, report=report, sequential=together, progress=progress)
    fishers = fisher_sets(recipe, models, report=report, progress=progress) if "fishers" in needs else []
    sensitivities: list[SensitivitySet] = []
    if weighted or "sensitivities" in needs:
        sensitivities = sensitivity_sets(recipe, models, report=report, progress=progress)
    batches = calibration_batches(recipe, models, report) if sequential else []
    weighing, of_anchor = (tuple(sensitivities), ()) if weighted else ((), tuple(sensitivities))
    by_task_vectors = recipe.output_weights == "task_vectors" and settings.solves
    return Statistics(tuple(grams), tuple(fishers), weighing, tuple(batches), of_anchor, by_task_vectors)


def _wants_grams(recipe: Recipe, settings: MergeSettings) -> bool:
    """Does the merge need measured Grams? In the mode sequential, which measures its own inputs, only for an anchor that does."""
    needed = bool(settings.anchor_needs & GRAMS) if recipe.mode == "sequential" else settings.needs_grams
    return needed and settings.gram_source != "task_vectors"


def check_files(recipe: Recipe, plan: MergePlan) -> None:
    """Raise, before anything is measured, for a file that does not belong to its expert. Names and shapes only; see `merging/belonging.py`. And
    `ConfigError` for calibration or Grams of a model that has nothing to solve on them."""
    settings = recipe.settings
    given = any(expert.calibration or expert.grams for expert in recipe.experts)
    if given and settings.solves and settings.gram_source != "task_vectors" and not plan.linear:
        named = ((plan.alignment.base.config or {}).get("architectures") or ["the model"])[0]
        raise ConfigError(f"{plan.alignment.base.label}: {nothing_to_solve(named)}")
    for aligned, expert in zip(plan.alignment.experts, recipe.experts, strict=True):
        if _wants_grams(recipe, settings) and _exists(expert.grams):
            measured_modules(plan.linear, [aligned], [GramSet.load(str(expert.grams))], settings)
        if "fishers" in settings.anchor_needs and _exists(expert.fisher):
            check_fishers(plan.alignment.merged, [aligned], [FisherSet.load(str(expert.fisher))], settings)
        if recipe.output_weights == "sensitivity" and settings.solves and _exists(expert.sensitivity):
            solved = [module for group in plan.groups for module in group.members]
            check_sensitivities(solved, [aligned], [SensitivitySet.load(str(expert.sensitivity))], settings)
        if "sensitivities" in settings.anchor_needs and _exists(expert.sensitivity):
            measured = [module for name, module in plan.linear.items() if name not in plan.unmeasured]
            check_sensitivities(measured, [aligned], [SensitivitySet.load(str(expert.sensitivity))], settings)


def _exists(file: str | None) -> bool:
    return file is not None and Path(file).exists()


def check_gram_places(recipe: Recipe, together: bool) -> None:
    """Refuse Gram files that would be written where the recipe may not; those that belong together are all written unless all exist."""
    exist = all(e.grams is not None and Path(e.grams).exists() for e in recipe.experts)
    recipe.check_writable("grams", missing_only=exist or not together)


def gram_sets(
    recipe: Recipe, models: Models, *, report: Report, sequential: bool = False, progress: bool | None = None
) -> list[GramSet]:
    """Each expert's Grams: from its file where it exists, else collected (and saved there if the recipe names a file).

    `sequential`: those of a walk that merges on the way, by the recipe's own anchor, which belong together: unless all files exist, all are
    measured.
    """
    files = [e.grams for e in recipe.experts]
    check_gram_places(recipe, sequential)
    data = _missing_data(recipe, models, files, "Gram", report, together=sequential)
    if sequential and data:
        return _walk(recipe, models, [data[i] for i in range(len(files))], report, progress)

    def collect(expert: ExpertRecipe, source: TensorSource, own: CalibrationData) -> GramSet:
        options = recipe.calibration
        return collect_from_checkpoint(
            source, own, options, modules=recipe.modules, device=recipe.device, progress=progress
        )

    return _opened_or_collected(
        recipe, models, files, data, GramSet.load, collect, "Grams", lambda own: f"{len(own.modules)} modules", report
    )


def expert_data(
    recipe: Recipe, expert: ExpertRecipe, source: TensorSource, base: TensorSource, report: Report = lambda line: None
) -> CalibrationData:
    """An expert's calibration data, and by what they are prepared. Raises `ConfigError`, `CheckpointError`."""
    options = recipe.calibration
    data = read_calibration(
        Path(str(expert.calibration)), samples=options.samples, field=options.field, target_field=options.target_field
    )
    if data.inputs is not None:
        return data
    return replace(data, prepared_by=preparing_folder(source, base, images=bool(data.images), report=report))


def calibration_batches(recipe: Recipe, models: Models, report: Report = lambda line: None) -> list[list[Any]]:
    """Each expert's calibration data as model inputs, made by its own tokenizer or processor; `report` hears of those that are few for a walk.
    Raises `ConfigError`, `CheckpointError`."""
    options, found = recipe.calibration, []
    for expert, source in zip(recipe.experts, models.experts, strict=True):
        data = expert_data(recipe, expert, source, models.base, report)
        if len(data) < FEW_SAMPLES:
            report(
                f"warning: {expert.label}: {len(data)} calibration samples ({expert.calibration}) are few for the mode sequential: below"
                f" {FEW_SAMPLES} the mode plain can be better. Give more, or say `mode: plain`."
            )
        path = model_folder(source)
        model = meta_model(path, held_by(source))
        if data.texts and not data.targets and needs_decoder_inputs(model, {"input_ids": torch.empty(1, 1)}):
            report(
                f"{expert.label}: its decoder reads the texts themselves, one token later; name the column of what it is to make of them with"
                " `calibration: {target_field: COLUMN}`"
            )
        found.append(batches_of(data, path, options, model))
    return found


def fisher_sets(recipe: Recipe, models: Models, *, report: Report, progress: bool | None = None) -> list[FisherSet]:
    """Each expert's Fisher information: from its file where it exists, else collected (and saved there if the recipe names a file)."""
    files = [e.fisher for e in recipe.experts]
    recipe.check_writable("fisher")

    def collect(expert: ExpertRecipe, source: TensorSource, own: CalibrationData) -> FisherSet:
        return fisher_from_checkpoint(source, own, recipe.calibration, device=recipe.device, progress=progress)

    data = _missing_data(recipe, models, files, "Fisher", report)
    return _opened_or_collected(
        recipe,
        models,
        files,
        data,
        FisherSet.load,
        collect,
        "Fisher information",
        lambda own: f"{own.examples} samples",
        report,
    )


def with_output_weights(recipe: Recipe, models: Models, report: Report = lambda line: None) -> Recipe:
    """The recipe with `output_weights` chosen, where it leaves them open: "sensitivity" if every expert's is measured, or can be: a classifier, or
    an encoder with its head, that has calibration; "task_vectors" without any data, then with `shrinkage` too; and "none" where the filter has
    no form with them. Raises `CheckpointError`."""
    chosen = recipe.output_weights or _output_weights(recipe, models, report)
    free = chosen == recipe.settings.gram_source == "task_vectors" and recipe.mode == "plain"
    shrinkage = SHRINKAGE if free and recipe.left_open("shrinkage") else recipe.shrinkage
    return recipe.model_copy(update={"output_weights": chosen, "shrinkage": shrinkage})


def _output_weights(recipe: Recipe, models: Models, report: Report) -> str:
    if not recipe.settings.spectral_filter.restricts:
        report(f"output_weights: none, since filter is {recipe.filter!r}")
        return "none"
    if recipe.alpha == math.inf:
        return "none"
    experts = zip(recipe.experts, models.experts, strict=True)
    lacking = [expert.label for expert, source in experts if not _can_be_weighed(expert, source)]
    if not lacking:
        report("output_weights: sensitivity, since every expert is a classifier")
        return "sensitivity"
    if recipe.settings.gram_source == "task_vectors":
        return "task_vectors"
    if all(e.calibration for e in recipe.experts):
        report(f"output_weights: none, since {lacking[0]} is no classifier and has no head")
    return "none"


def _can_be_weighed(expert: ExpertRecipe, source: TensorSource) -> bool:
    if expert.sensitivity is not None and Path(expert.sensitivity).exists():
        return True
    if expert.calibration is None:
        return False
    if expert.head is not None:
        return True
    name: str = model_class(load_config(model_folder(source), held_by(source))).__name__
    return name.endswith("Classification")


def sensitivity_sets(
    recipe: Recipe, models: Models, *, report: Report, progress: bool | None = None
) -> list[SensitivitySet]:
    """Each expert's sensitivities: from its file where it exists, else collected (and saved there if the recipe names a file)."""
    files = [e.sensitivity for e in recipe.experts]
    recipe.check_writable("sensitivity")

    def collect(expert: ExpertRecipe, source: TensorSource, own: CalibrationData) -> SensitivitySet:
        return _sensitivity(recipe, expert, source, own, progress)

    data = _missing_data(recipe, models, files, "sensitivity", report)
    return _opened_or_collected(
        recipe,
        models,
        files,
        data,
        SensitivitySet.load,
        collect,
        "sensitivities",
        lambda own: f"{len(own.names)} modules",
        report,
    )


def _sensitivity(
    recipe: Recipe,
    expert: ExpertRecipe,
    source: TensorSource,
    own: CalibrationData,
    progress: bool | None,
    prepare: Callable[[nn.Module], object] = lambda live: None,
) -> SensitivitySet:
    return sensitivity_from_checkpoint(
        source,
        own,
        recipe.calibration,
        modules=recipe.modules,
        head=None if expert.head is None else Path(expert.head),
        pooling=recipe.evaluation.pooling if recipe.evaluation else "mean",
        device=recipe.device,
        progress=progress,
        prepare=prepare,
    )


def remeasuring(
    recipe: Recipe,
    models: Models,
    alignment: Alignment,
    report: Report = lambda line: None,
    progress: bool | None = None,
) -> Remeasure:
    """What measures sensitivities again at a merged network: an expert's own model, with its own head, holds the merged tensors, and reads the
    expert's calibration."""

    def measure_again(tensors: Mapping[str, Tensor], t: int) -> SensitivitySet:
        expert, source = recipe.experts[t], models.experts[t]

        @torch.no_grad()
        def prepare(live: nn.Module) -> None:
            heads = {name: live.get_parameter(name).clone() for name in head_parameters(live)}
            share_parameters(alignment, [(expert.label, t, lambda: live)]).load(tensors)
            for name, own in heads.items():  # those of classifiers are merged too, by the anchor
                live.get_parameter(name).copy_(own)

        data = expert_data(recipe, expert, source, models.base)
        found = _sensitivity(recipe, expert, source, data, progress, prepare)
        report(f"{expert.label}: sensitivities of {len(found.names)} modules measured again at the merged network")
        return found

    return measure_again


def _opened_or_collected(
    recipe: Recipe,
    models: Models,
    files: Sequence[str | None],
    data: Mapping[int, CalibrationData],
    load: Callable[[str], Any],
    collect: Callable[[ExpertRecipe, TensorSource, CalibrationData], Any],
    what: str,
    size: Callable[[Any], str],
    report: Report,
) -> list[Any]:
    """What was measured on each expert: from its file, or, where there is `data` for it, collected (and saved there if a file is named)."""
    sets = []
    for i, (expert, file) in enumerate(zip(recipe.experts, files, strict=True)):
        if i not in data:
            sets.append(load(str(file)))
            report(f"{expert.label}: {what} from {file}")
            continue
        found = collect(expert, models.experts[i], data[i])
        if file is not None:
            found.save(file)
        report(f"{expert.label}: {what} of {size(found)} collected from {data[i].describe()}")
        sets.append(found)
    return sets


def _missing_data(
    recipe: Recipe,
    models: Models,
    files: Sequence[str | None],
    what: str,
    report: Report,
    together: bool = False,
) -> dict[int, CalibrationData]:
    """Expert -> its calibration data, for those whose file does not exist. Read before the first model runs: a wrong path is found at once."""
    wanted = [i for i, file in enumerate(files) if file is None or not Path(file).exists()]
    if together and wanted:
        wanted = list(range(len(files)))
    found = {}
    for i in wanted:
        expert = recipe.experts[i]
        if expert.calibration is None:
            raise ConfigError(
                f"expert {expert.label!r}: its {what} file {files[i]!r} does not exist, and no `calibration` says how to make it. Collect it"
                " first (`bmm collect`), or name its calibration data."
            )
        found[i] = expert_data(recipe, expert, models.experts[i], models.base, report)
    return found


def _walk(
    recipe: Recipe, models: Models, data: list[CalibrationData], report: Report, progress: bool | None
) -> list[GramSet]:
    options = recipe.calibration
    base, _ = live_model(models.base, dtype=options.dtype, device=recipe.device)
    experts, batches = [], []
    for source, own in zip(models.experts, data, strict=True):
        # As the base's class: a bare encoder as the base has experts without their heads.
        live, path = live_model(source, cls=type(base), dtype=options.dtype, device=recipe.device)
        experts.append(live)
        batches.append(batches_of(own, path, options, live))
    sets = collect_sequential(
        base,
        experts,
        batches,
        anchor=recipe.anchor.name,
        modules=recipe.modules,
        calibration=[own.describe() for own in data],
        progress=progress,
        **recipe.anchor_parameters,
    )
    for expert, grams in zip(recipe.experts, sets, strict=True):
        if expert.grams is not None:
            grams.save(expert.grams)
        report(f"{expert.label}: Grams of {len(grams.modules)} modules collected while merging")
    return sets

"""What the experts of a recipe are measured for on their calibration data: Grams, Grams of a sequential walk, Fisher information, sensitivities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm_engine.checkpoint import AdapterSource, Checkpoint, TensorSource, open_adapter
from bmm_engine.checkpoint.compose import LayerRange, StackedSource
from bmm_engine.errors import CheckpointError, ConfigError
from bmm_engine.evaluators.heads import with_head
from bmm_engine.merging.sources import adapter_options, open_expert
from bmm_engine.models.architecture import checkpoint_names, load_config, model_class
from bmm_engine.progress import quiet_transformers
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.references import ExpertRecipe, ModelRecipe, StackRecipe
from bmm_engine.recipe.sections import CalibrationRecipe
from bmm_engine.statistics.calibration import CalibrationData, read_calibration
from bmm_engine.statistics.fisher import FisherSet, collect_fisher
from bmm_engine.statistics.grams import GramSet
from bmm_engine.statistics.sensitivity import SensitivitySet, collect_sensitivity

if TYPE_CHECKING:
    from torch import nn

Report = Callable[[str], None]
# Of a task: below, a plain merge on hybrid Grams can be better (bench/README.md, "How much calibration data").
FEW_SAMPLES = 16


class Models:
    """Opens the models that a recipe names, each checkpoint once."""

    def __init__(self, local_files_only: bool = False):
        self.local_files_only = local_files_only
        self._open: dict[tuple[str | None, ...], TensorSource] = {}

    def get(self, model: str | ModelRecipe | StackRecipe) -> str | TensorSource:
        """A model for `merge`: a path or hub id as it is, anything else as a source. Raises what opening it raises."""
        return model if isinstance(model, str) else self.source(model)

    def source(self, model: str | ModelRecipe | StackRecipe) -> TensorSource:
        """A full model, or one with its adapter."""
        if isinstance(model, StackRecipe):
            return StackedSource([LayerRange(self.source(part), *part.layers) for part in model.slices])
        if isinstance(model, str):
            model = ModelRecipe(model=model)
        key = (model.model, model.revision, model.adapter, model.adapter_revision)
        if key not in self._open:
            self._open[key] = self._opened(model)
        return self._open[key]

    def expert(self, recipe: Recipe, expert: ExpertRecipe) -> TensorSource:
        """An expert, which may be an adapter of the recipe's base."""
        if not isinstance(expert.model, str):
            return self.source(expert.model)
        return open_expert(expert.model, self.source(recipe.base), expert.label, self.local_files_only)

    def _opened(self, model: ModelRecipe) -> TensorSource:
        if model.adapter is None:
            return Checkpoint.open(model.model, revision=model.revision, local_files_only=self.local_files_only)
        base = self.source(ModelRecipe(model=model.model, revision=model.revision))
        return open_adapter(
            model.adapter,
            base,
            revision=model.adapter_revision,
            local_files_only=self.local_files_only,
            **adapter_options(base),
        )


def live_model(
    source: TensorSource, *, cls: Any = None, dtype: str = "float32", device: str = "cpu", reports: bool = True
) -> tuple[nn.Module, Path]:
    """A checkpoint, or an adapter on one, as a live model of its own architecture (or of the class `cls`); and where its tokenizer lies.
    `reports`: let transformers say what the files lack.

    Raises `CheckpointError` for what transformers cannot load.
    """
    import torch

    path = model_folder(source)
    cls = cls or model_class(load_config(path))
    try:
        with quiet_transformers(reports):
            live = cls.from_pretrained(path, dtype=getattr(torch, dtype), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: transformers cannot load it as {cls.__name__}: {error}") from error
    if isinstance(source, AdapterSource):
        with torch.no_grad():
            for name, tensor in source.live_tensors(checkpoint_names(live)):
                live.get_parameter(name).copy_(tensor)
    return live.to(device), path


def model_folder(source: TensorSource) -> Path:
    """Where a model that can be run lies, with its config and tokenizer: of an adapter, its base. Raises `CheckpointError` for a view."""
    root = source.base if isinstance(source, AdapterSource) else source
    if not isinstance(root, Checkpoint):
        raise CheckpointError(
            f"{source.label}: cannot be run, since it is no checkpoint of its own; save it as one, or name statistics measured before."
        )
    return root.path


def collect_from_checkpoint(
    model: str | TensorSource,
    data: CalibrationData,
    options: CalibrationRecipe,
    *,
    modules: list[str] | None = None,
    device: str = "cpu",
    local_files_only: bool = False,
    progress: bool | None = None,
) -> GramSet:
    """Load a checkpoint (path, hub id or source) with its own architecture and measure its Grams on `data`.

    Raises `CheckpointError` for what transformers cannot load, and whatever `collect_grams` raises.
    """
    from bmm_engine.statistics.collect import collect_grams

    source = Checkpoint.open(model, local_files_only=local_files_only) if isinstance(model, str) else model
    live, path = live_model(source, dtype=options.dtype, device=device)
    _without_logits(live)
    return collect_grams(
        live, _batches(data, path, options), modules=modules, calibration=data.describe(), progress=progress
    )


def fisher_from_checkpoint(
    model: str | TensorSource,
    data: CalibrationData,
    options: CalibrationRecipe,
    *,
    device: str = "cpu",
    local_files_only: bool = False,
    progress: bool | None = None,
) -> FisherSet:
    """The same for the diagonal Fisher information, with labels as `options.fisher_labels` says. Raises as `collect_fisher`."""
    source = Checkpoint.open(model, local_files_only=local_files_only) if isinstance(model, str) else model
    live, path = live_model(source, dtype=options.dtype, device=device)
    return collect_fisher(
        live,
        _batches(data, path, options),
        labels=options.fisher_labels,
        examples=options.samples,
        calibration=data.describe(),
        progress=progress,
    )


def sensitivity_from_checkpoint(
    model: str | TensorSource,
    data: CalibrationData,
    options: CalibrationRecipe,
    *,
    head: Path | None = None,
    pooling: str = "mean",
    modules: list[str] | None = None,
    device: str = "cpu",
    local_files_only: bool = False,
    progress: bool | None = None,
) -> SensitivitySet:
    """The same for its sensitivities. `head`: a bare encoder's own, a safetensors file, on what `pooling` ("mean", "cls") makes of its output.
    Raises as `collect_sensitivity`."""
    source = Checkpoint.open(model, local_files_only=local_files_only) if isinstance(model, str) else model
    # A head of its own reads no pooler; that the file lacks one is no news.
    live, path = live_model(source, dtype=options.dtype, device=device, reports=head is None)
    return collect_sensitivity(
        live,
        _batches(data, path, options),
        logits=None if head is None else with_head(live, head, pooling).logits,
        modules=modules,
        calibration=data.describe(),
        progress=progress,
    )


def gram_sets(
    recipe: Recipe, models: Models, *, report: Report, sequential: bool = False, progress: bool | None = None
) -> list[GramSet]:
    """Each expert's Grams: from its file where it exists, else collected (and saved there if the recipe names a file).

    `sequential`: those of a walk that merges on the way, by the recipe's own anchor, which belong together: unless all files exist, all are
    measured.
    """
    files = [e.grams for e in recipe.experts]
    data = _missing_data(recipe, files, "Gram", together=sequential)
    if sequential and data:
        return _walk(recipe, models, [data[i] for i in range(len(files))], report, progress)

    def collect(expert: ExpertRecipe, own: CalibrationData) -> GramSet:
        model, options = models.expert(recipe, expert), recipe.calibration
        return collect_from_checkpoint(
            model, own, options, modules=recipe.modules, device=recipe.device, progress=progress
        )

    return _opened_or_collected(
        recipe, files, data, GramSet.load, collect, "Grams", lambda own: f"{len(own.modules)} modules", report
    )


def calibration_batches(recipe: Recipe, models: Models, report: Report = lambda line: None) -> list[list[Any]]:
    """Each expert's calibration data as model inputs, made by its own tokenizer or processor; `report` hears of those that are few for a walk.
    Raises `ConfigError`, `CheckpointError`."""
    options, found = recipe.calibration, []
    for expert in recipe.experts:
        data = read_calibration(Path(str(expert.calibration)), samples=options.samples, field=options.field)
        if len(data) < FEW_SAMPLES:
            report(
                f"warning: {expert.label}: {len(data)} calibration samples ({expert.calibration}) are few for the mode sequential: below"
                f" {FEW_SAMPLES} the mode plain can be better. Give more, or say `mode: plain`."
            )
        found.append(_batches(data, model_folder(models.expert(recipe, expert)), options))
    return found


def fisher_sets(recipe: Recipe, models: Models, *, report: Report, progress: bool | None = None) -> list[FisherSet]:
    """Each expert's Fisher information: from its file where it exists, else collected (and saved there if the recipe names a file)."""
    files = [e.fisher for e in recipe.experts]

    def collect(expert: ExpertRecipe, own: CalibrationData) -> FisherSet:
        model, options = models.expert(recipe, expert), recipe.calibration
        return fisher_from_checkpoint(model, own, options, device=recipe.device, progress=progress)

    data = _missing_data(recipe, files, "Fisher")
    return _opened_or_collected(
        recipe,
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
    an encoder with its head, that has calibration. Raises `CheckpointError`."""
    if recipe.output_weights is not None:
        return recipe
    lacking = [e.label for e in recipe.experts if not _can_be_weighed(recipe, e, models)]
    chosen = "none" if lacking or recipe.alpha == math.inf else "sensitivity"
    if chosen == "sensitivity":
        report("output_weights: sensitivity, since every expert is a classifier")
    elif recipe.alpha != math.inf and all(e.calibration for e in recipe.experts):
        report(f"output_weights: none, since {lacking[0]} is no classifier and has no head")
    return recipe.model_copy(update={"output_weights": chosen})


def _can_be_weighed(recipe: Recipe, expert: ExpertRecipe, models: Models) -> bool:
    if expert.sensitivity is not None and Path(expert.sensitivity).exists():
        return True
    if expert.calibration is None:
        return False
    if expert.head is not None:
        return True
    name: str = model_class(load_config(model_folder(models.expert(recipe, expert)))).__name__
    return name.endswith("Classification")


def sensitivity_sets(
    recipe: Recipe, models: Models, *, report: Report, progress: bool | None = None
) -> list[SensitivitySet]:
    """Each expert's sensitivities: from its file where it exists, else collected (and saved there if the recipe names a file)."""
    files = [e.sensitivity for e in recipe.experts]
    pooling = recipe.evaluation.pooling if recipe.evaluation else "mean"

    def collect(expert: ExpertRecipe, own: CalibrationData) -> SensitivitySet:
        return sensitivity_from_checkpoint(
            models.expert(recipe, expert),
            own,
            recipe.calibration,
            modules=recipe.modules,
            head=None if expert.head is None else Path(expert.head),
            pooling=pooling,
            device=recipe.device,
            progress=progress,
        )

    data = _missing_data(recipe, files, "sensitivity")
    return _opened_or_collected(
        recipe,
        files,
        data,
        SensitivitySet.load,
        collect,
        "sensitivities",
        lambda own: f"{len(own.names)} modules",
        report,
    )


def _opened_or_collected(
    recipe: Recipe,
    files: Sequence[str | None],
    data: Mapping[int, CalibrationData],
    load: Callable[[str], Any],
    collect: Callable[[ExpertRecipe, CalibrationData], Any],
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
        found = collect(expert, data[i])
        if file is not None:
            found.save(file)
        report(f"{expert.label}: {what} of {size(found)} collected from {data[i].describe()}")
        sets.append(found)
    return sets


def _missing_data(
    recipe: Recipe, files: Sequence[str | None], what: str, together: bool = False
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
        options = recipe.calibration
        found[i] = read_calibration(Path(expert.calibration), samples=options.samples, field=options.field)
    return found


def _walk(
    recipe: Recipe, models: Models, data: list[CalibrationData], report: Report, progress: bool | None
) -> list[GramSet]:
    from bmm_engine.statistics.sequential_grams import collect_sequential

    options = recipe.calibration
    base, _ = live_model(models.source(recipe.base), dtype=options.dtype, device=recipe.device)
    experts, batches = [], []
    for expert, own in zip(recipe.experts, data, strict=True):
        source = models.expert(recipe, expert)
        # As the base's class: a bare encoder as the base has experts without their heads.
        live, path = live_model(source, cls=type(base), dtype=options.dtype, device=recipe.device)
        experts.append(live)
        batches.append(_batches(own, path, options))
    for live in (base, *experts):
        _without_logits(live)
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


def _batches(data: CalibrationData, path: Path, options: CalibrationRecipe) -> list[Any]:
    return list(data.batches(path, batch_size=options.batch_size, max_length=options.max_length))


def _without_logits(live: Any) -> None:
    """Logits over a whole vocabulary are large, and for Grams nobody reads them."""
    import torch

    if live.get_output_embeddings() is not None:
        live.set_output_embeddings(torch.nn.Identity())

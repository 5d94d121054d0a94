"""Merge fine-tunes of one base: from paths, state dicts or live models, to a checkpoint on disk or tensors in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmm_engine.checkpoint import InputRecords
from bmm_engine.errors import ConfigError
from bmm_engine.executors.devices import check_device
from bmm_engine.merging.outcomes import outcomes, told, totals
from bmm_engine.merging.output import IN_MEMORY, Destination, Target, check_sidecars, inputs_of, write_sidecars
from bmm_engine.merging.plan import MergePlan, make_plan
from bmm_engine.merging.sources import Model, Models
from bmm_engine.merging.stream import InputRecord, MergeStream, ModuleRecord
from bmm_engine.progress import track
from bmm_engine.recipe.keywords import settings_of, takes_settings
from bmm_engine.recipe.settings import MergeSettings
from bmm_engine.solving.posterior import Posterior
from bmm_engine.statistics.sets import Fishers, Grams, Sensitivities, Statistics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeResult:
    """`tensors` (name -> tensor) for a merge in memory, else `path` of the written checkpoint; what was done to each module; the plan.

    `posterior`: which draw from the posterior it is; None for the MAP. `inputs`: of a sequential merge, what was found at each input.
    `diagnostics`: tensor -> what the anchor's rule found out there (of the rules that do, as `epimer`).
    """

    plan: MergePlan
    modules: list[ModuleRecord]
    tensors: dict[str, Tensor] | None = None
    path: Path | None = None
    posterior: Posterior | None = None
    inputs: list[InputRecord] = field(default_factory=list)
    diagnostics: dict[str, dict[str, float]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON: counts, what was left out, and a record for each module."""
        alignment = self.plan.alignment
        return {
            "solved_modules": len(self.modules),
            "tensors_from_anchor": len(self.plan.from_anchor),
            "tensors_from_base": len(self.plan.from_base),
            "modules_without_gram": list(self.plan.unmeasured),
            "tensors": totals(outcomes(alignment, self.plan.solved)),
            "notes": list(self.plan.notes),
            "left_out_of_experts": {label: list(names) for label, names in alignment.expert_only.items() if names},
            "posterior": None if self.posterior is None else asdict(self.posterior),
            "modules": [asdict(record) for record in self.modules],
            "inputs": [asdict(record) for record in self.inputs],
            "diagnostics": self.diagnostics,
        }


@takes_settings("plain")
def plan_merge(
    base: Model,
    experts: Sequence[Model],
    *,
    grams: Grams = "task_vectors",
    settings: MergeSettings | None = None,
    fishers: Fishers = (),
    sensitivities: Sensitivities = (),
    local_files_only: bool = False,
    **options: Any,
) -> MergePlan:
    """What `merge` would do, from headers alone; nothing is computed or written. `settings`: those that the keywords change.

    Raises as `merge` does.
    """
    statistics = Statistics.open(grams, fishers, sensitivities)
    models = Models.open(base, experts, local_files_only)
    source = "data" if statistics.grams else "task_vectors"
    chosen = settings_of("plain", options, gram_source=source) if settings is None else settings.but(**options)
    return make_plan(chosen, models, statistics)


@takes_settings("plain")
def merge(
    base: Model,
    experts: Sequence[Model],
    *,
    grams: Grams = "task_vectors",
    hybrid: float | None = None,
    fishers: Fishers = (),
    sensitivities: Sensitivities = (),
    posterior: Posterior | None = None,
    output: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    recipe: Mapping[str, Any] | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> MergeResult:
    """Bayesian Model Merging (arXiv 2605.12843): per linear module `W* = W_a + R A^{-1}`, then `W_0 + scale (W* - W_0)`.

    `base`, `experts`: Hugging Face directories or hub ids, state dicts, or live models, in any mix; all fine-tunes of one architecture. An
    expert may be a PEFT LoRA adapter of the base, in a directory or on the hub.
    `grams`: one GramSet or path per expert (data), or "task_vectors" (data-free). `hybrid`: share g in [0, 1] of the task-vector Gram beside
    the data's (recipes take 0.5, which is better than either on all that was measured). `fishers`: one FisherSet or path per expert, for the
    rules that need them. `sensitivities`: one SensitivitySet or path per expert (`collect_sensitivity`): an error of a module's outputs then
    counts by how much the expert's predictions depend on it (`bmm_engine.solving.weighted`), and rules that need them have them; or
    "task_vectors": it counts by `U_t U_t^T`, which stands for that without data. Not with `posterior`.
    `posterior`: a draw from the posterior instead of its mean, the MAP: `W* + tau Z L^{-1}` in every solved module, before `scale`; what comes
    from the anchor (all modules at `alpha=math.inf`) has no posterior and stays as it is. Noise below half a unit in the last place of the
    output's dtype is lost in it.
    `output`: a directory to write (staged, then renamed; never half); without it the tensors come back in memory, on the CPU.
    `dtype`: of the output's float tensors (default: as in the base). Arithmetic is float32 (float64 for the solves), rounded once.
    The settings below are the same in a recipe. `anchor_parameters`, `alpha` and `scale` may vary over the model (a gradient over depth, filters by
    name: see `bmm_engine.anchors.settings`). `alpha` 0 is RegMean; inf is the anchor's own merge, of all tensors. `fit_bias` needs `grams`.

    Raises `ConfigError`, `MissingTensorError`, `ShapeMismatchError`, `NonFiniteWeightError`, `NonFiniteGramError`, `GramMismatchError`,
    `NotPositiveDefiniteError`, `CheckpointError`, `OutputExistsError`, `OutputWriteError`; then nothing is left on disk.
    """
    measured = grams is not None and not isinstance(grams, str)
    if hybrid is not None and not measured:
        raise ConfigError("hybrid mixes measured Grams with task vectors: give the Grams too (grams=[...]).")
    mixed = {} if hybrid is None else {"gram_source": "hybrid", "hybrid_share": hybrid}
    settings = settings_of("plain", options, **{"gram_source": "data" if measured else "task_vectors", **mixed})
    return merge_models(
        settings,
        Models.open(base, experts, local_files_only),
        Statistics.open(grams, fishers, sensitivities),
        Destination(None if output is None else Path(output), dtype, max_shard_size, overwrite, recipe),
        posterior=posterior,
        progress=progress,
    )


def merge_models(
    settings: MergeSettings,
    models: Models,
    statistics: Statistics,
    destination: Destination = IN_MEMORY,
    *,
    posterior: Posterior | None = None,
    progress: bool | None = None,
) -> MergeResult:
    """`merge` of what is open and checked: what keywords and recipes come to. Raises as it does."""
    check_device(settings.device)
    plan = make_plan(settings, models, statistics)
    plan.check_statistics()
    if posterior is not None and statistics.output_weights != "none":
        raise ConfigError("draws from the posterior are for outputs that count alike: leave out `sensitivities`.")
    if posterior is not None:
        settings.check_posterior()
    log_notes(plan)
    specs = destination.specs(plan.alignment)
    writer = destination.writer(specs)
    if writer is not None:
        check_sidecars(plan, destination)
    target = Target(specs, writer, plan.alignment.buffers)
    stream = MergeStream(plan, target.finish, posterior)
    if writer is None:
        run_stream(stream, target, progress)
        tensors = tensors_of(target, plan)
        return MergeResult(plan, stream.records, tensors, posterior=posterior, diagnostics=stream.diagnostics)
    with writer, InputRecords(inputs_of(plan), torch.get_num_threads()) as inputs:
        run_stream(stream, target, progress)
        result = MergeResult(plan, stream.records, posterior=posterior, diagnostics=stream.diagnostics)
        write_sidecars(writer, plan, inputs.result(), result.summary(), destination)
        path = writer.commit()
    return replace(result, path=path)


def log_notes(plan: MergePlan) -> None:
    """Say what the plan notes, and what becomes of the tensors of each input."""
    for note in plan.notes:
        logger.warning("%s", note)
    for label, own in totals(outcomes(plan.alignment, plan.solved)).items():
        logger.info("%s: %s", label, told(own))


def run_stream(stream: MergeStream, target: Target, progress: bool | None, label: str = "merging") -> None:
    """Carry out a merge, and put all its pieces into the target."""
    for pieces in track(stream, label, total=len(stream), show=progress):
        for piece in pieces:
            target.put(piece)


def tensors_of(target: Target, plan: MergePlan) -> dict[str, Tensor]:
    """What a merge in memory gave, in the base's order, tied names included."""
    ordered = {name: target.tensors[name] for name in target.specs}
    ordered.update({alias: ordered[name] for alias, name in plan.alignment.base.aliases.items() if name in ordered})
    return ordered

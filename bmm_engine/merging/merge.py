"""Merge fine-tunes of one base: from paths, state dicts or live models, to a checkpoint on disk or tensors in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmm_engine.checkpoint import CheckpointWriter, InputRecords
from bmm_engine.errors import ConfigError
from bmm_engine.merging.align import align
from bmm_engine.merging.output import Target, inputs_of, output_specs, write_sidecars
from bmm_engine.merging.plan import MergePlan, MergeSettings, build_plan, find_linear_modules, given_task_weights
from bmm_engine.merging.sources import Model, open_expert, open_model
from bmm_engine.merging.stream import InputRecord, MergeStream, ModuleRecord
from bmm_engine.progress import track
from bmm_engine.solving.posterior import Posterior
from bmm_engine.statistics.fisher import FisherSet
from bmm_engine.statistics.grams import GramSet, as_gram_sets
from bmm_engine.statistics.sensitivity import SensitivitySet


@dataclass(frozen=True)
class MergeResult:
    """`tensors` (name -> tensor) for a merge in memory, else `path` of the written checkpoint; what was done to each module; the plan.

    `posterior`: which draw from the posterior it is; None for the MAP. `inputs`: of a sequential merge, what was found at each input.
    """

    plan: MergePlan
    modules: list[ModuleRecord]
    tensors: dict[str, Tensor] | None = None
    path: Path | None = None
    posterior: Posterior | None = None
    inputs: list[InputRecord] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON: counts, what was left out, and a record for each module."""
        alignment = self.plan.alignment
        return {
            "solved_modules": len(self.modules),
            "tensors_from_anchor": len(self.plan.from_anchor),
            "tensors_from_base": len(self.plan.from_base),
            "modules_without_gram": list(self.plan.unmeasured),
            "left_out_of_experts": {label: list(names) for label, names in alignment.expert_only.items() if names},
            "posterior": None if self.posterior is None else asdict(self.posterior),
            "modules": [asdict(record) for record in self.modules],
            "inputs": [asdict(record) for record in self.inputs],
        }


def plan_merge(
    base: Model,
    experts: Sequence[Model],
    *,
    grams: Any = "task_vectors",
    settings: MergeSettings | None = None,
    modules: Iterable[str] | None = None,
    keep_base: Iterable[str] = (),
    vocabulary: str = "error",
    fishers: Sequence[FisherSet | str | os.PathLike[str]] = (),
    sensitivities: Sequence[SensitivitySet | str | os.PathLike[str]] = (),
    local_files_only: bool = False,
) -> MergePlan:
    """What `merge` would do, from headers alone; nothing is computed or written. Raises as `merge` does."""
    settings = settings or MergeSettings()
    if not experts:
        raise ConfigError("no experts: give at least one fine-tuned model.")
    modules = [modules] if isinstance(modules, str) else list(modules) if modules is not None else None
    root = open_model(base, "base", local_files_only)
    sources = [open_expert(e, root, f"expert {i}", local_files_only) for i, e in enumerate(experts)]
    alignment = align(root, sources, keep_base, vocabulary)
    gram_sets = [] if isinstance(grams, str) or grams is None else as_gram_sets(grams)
    # The anchor alone needs to know the modules only if it treats matrices in a way of their own.
    needs_modules = settings.solves or settings.rule.linear
    linear = find_linear_modules(alignment, base, modules, gram_sets) if needs_modules else {}
    fisher_sets = [f if isinstance(f, FisherSet) else FisherSet.load(f) for f in fishers]
    sensitivity_sets = [s if isinstance(s, SensitivitySet) else SensitivitySet.load(s) for s in sensitivities]
    return build_plan(alignment, linear, settings, gram_sets, modules is not None, fisher_sets, sensitivity_sets)


def merge(
    base: Model,
    experts: Sequence[Model],
    *,
    anchor: str = "average",
    anchor_parameters: Mapping[str, Any] | None = None,
    grams: Sequence[GramSet | str | os.PathLike[str]] | str = "task_vectors",
    hybrid: float | None = None,
    alpha: Any = 0.03,
    scale: Any = 1.0,
    task_weights: str | Sequence[float] | None = None,
    fit_bias: bool = False,
    normalization: str = "trace",
    modules: Iterable[str] | None = None,
    keep_base: Iterable[str] = (),
    vocabulary: str = "error",
    fishers: Sequence[FisherSet | str | os.PathLike[str]] = (),
    sensitivities: Sequence[SensitivitySet | str | os.PathLike[str]] = (),
    sensitivity_share: float = 0.75,
    posterior: Posterior | None = None,
    output: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    device: str = "cpu",
    recipe: Mapping[str, Any] | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
) -> MergeResult:
    """Bayesian Model Merging (arXiv 2605.12843): per linear module `W* = W_a + R A^{-1}`, then `W_0 + scale (W* - W_0)`.

    `base`, `experts`: Hugging Face directories or hub ids, state dicts, or live models, in any mix; all fine-tunes of one architecture. An
    expert may be a PEFT LoRA adapter of the base, in a directory or on the hub.
    `anchor`: a rule by name, with `anchor_parameters`; it also gives every tensor that is not a linear module (norms, embeddings, heads).
    With `alpha=math.inf` the result is the rule's own merge.
    `grams`: one GramSet or path per expert (data), or "task_vectors" (data-free). `hybrid`: share g in [0, 1] of the task-vector Gram beside
    the data's (recipes take 0.5, which is better than either on all that was measured). `alpha`: ridge relative to the mean diagonal (inf: the
    anchor itself; 0: RegMean). `task_weights`: None, "energy", or a number per expert. `fit_bias`: solve biases with the weights (data only).
    `modules`: shell patterns of the linear modules to solve (default: all but heads). `keep_base`: patterns of tensors to copy from the base.
    `vocabulary`: where embeddings differ in rows, "error", "crop" or "pad".
    `fishers`: one FisherSet or path per expert, for the rules that need them. Parameters of the anchor, `alpha` and `scale` may vary over the
    model (a gradient over depth, filters by name: see `bmm_engine.anchors.settings`).
    `sensitivities`: one SensitivitySet or path per expert (`collect_sensitivity`): an error of a module's outputs then counts by how much the
    expert's predictions depend on it, `sensitivity_share` of the weight, and evenly, the rest (`bmm_engine.solving.weighted`); not with `posterior`.
    `posterior`: a draw from the posterior instead of its mean, the MAP: `W* + tau Z L^{-1}` in every solved module, before `scale`; what comes
    from the anchor (all modules at `alpha=math.inf`) has no posterior and stays as it is. Noise below half a unit in the last place of the
    output's dtype is lost in it.
    `output`: a directory to write (staged, then renamed; never half); without it the tensors come back in memory, on the CPU.
    `dtype`: of the output's float tensors (default: as in the base). Arithmetic is float32 (float64 for the solves), rounded once.

    Raises `ConfigError`, `MissingTensorError`, `ShapeMismatchError`, `NonFiniteWeightError`, `NonFiniteGramError`, `GramMismatchError`,
    `NotPositiveDefiniteError`, `CheckpointError`, `OutputExistsError`, `OutputWriteError`; then nothing is left on disk.
    """
    settings = MergeSettings(
        anchor=anchor,
        anchor_parameters=dict(anchor_parameters or {}),
        gram_source=_gram_source(grams, hybrid),
        hybrid_share=0.5 if hybrid is None else hybrid,
        normalization=normalization,
        alpha=alpha,
        scale=scale,
        task_weights=given_task_weights(task_weights),
        sensitivity_share=sensitivity_share,
        fit_bias=fit_bias,
        device=device,
    )
    plan = plan_merge(
        base,
        experts,
        grams=grams,
        settings=settings,
        modules=modules,
        keep_base=keep_base,
        vocabulary=vocabulary,
        fishers=fishers,
        sensitivities=sensitivities,
        local_files_only=local_files_only,
    )
    plan.check_statistics()
    if posterior is not None and plan.sensitivities:
        raise ConfigError("draws from the posterior are for outputs that count alike: leave out `sensitivities`.")
    specs = output_specs(plan.alignment, dtype)
    if output is None:
        target = Target(specs)
        stream = MergeStream(plan, target.finish, posterior)
        run_stream(stream, target, progress)
        return MergeResult(plan, stream.records, tensors=tensors_of(target, plan), posterior=posterior)
    # Sharding and the output path are refused before any work.
    writer = CheckpointWriter(Path(output), list(specs.values()), max_shard_bytes=max_shard_size, overwrite=overwrite)
    with writer, InputRecords(inputs_of(plan), torch.get_num_threads()) as inputs:
        target = Target(specs, writer)
        stream = MergeStream(plan, target.finish, posterior)
        run_stream(stream, target, progress)
        result = MergeResult(plan, stream.records, posterior=posterior)
        write_sidecars(writer, plan, inputs.result(), result.summary(), recipe, dtype)
        path = writer.commit()
    return replace(result, path=path)


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


def _gram_source(grams: Any, hybrid: float | None) -> str:
    if isinstance(grams, str):
        if grams != "task_vectors":
            raise ConfigError(
                f"grams must be 'task_vectors' or a list with one GramSet or path per expert, not {grams!r}."
            )
        if hybrid is not None:
            raise ConfigError("hybrid mixes measured Grams with task vectors: give the Grams too (grams=[...]).")
        return "task_vectors"
    return "data" if hybrid is None else "hybrid"

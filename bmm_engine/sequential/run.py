"""Merge in the order in which the network computes: every module is solved on the inputs that the merged modules below it really give it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import bmm_engine
from bmm_engine.checkpoint import Checkpoint, CheckpointWriter, InputRecords, StateDictSource, TensorSource
from bmm_engine.checkpoint.compose import checkpoints_of
from bmm_engine.checkpoint.identity import as_texts, model_digest, values_digest
from bmm_engine.errors import ConfigError, OutputExistsError
from bmm_engine.locks import LockFile
from bmm_engine.merging.align import float_dtype
from bmm_engine.merging.merge import MergeResult, plan_merge, run_stream, tensors_of
from bmm_engine.merging.output import Target, inputs_of, output_specs, recipe_of, write_sidecars
from bmm_engine.merging.plan import MergePlan, MergeSettings, given_task_weights
from bmm_engine.merging.sources import Model
from bmm_engine.merging.stream import MergeStream, Piece, row_slabs
from bmm_engine.models.calling import Mask
from bmm_engine.progress import track
from bmm_engine.sequential.options import SequentialOptions
from bmm_engine.sequential.skeleton import Skeleton
from bmm_engine.sequential.state import Merged, Sweep, open_folder, writing
from bmm_engine.sequential.walk import Report, SequentialWalk
from bmm_engine.statistics.fisher import FisherSet
from bmm_engine.statistics.sensitivity import SensitivitySet


def merge_sequential(
    base: Model,
    experts: Sequence[Model],
    batches: Sequence[Iterable[Any]],
    *,
    anchor: str = "average",
    anchor_parameters: Mapping[str, Any] | None = None,
    grams: Any = "task_vectors",
    fishers: Sequence[FisherSet | str | os.PathLike[str]] = (),
    alpha: Any = 0.03,
    scale: Any = 1.0,
    task_weights: str | Sequence[float] | None = "energy",
    fit_bias: bool = True,
    target: str = "stream",
    mean_weight: float = 0.0,
    task_vector_samples: float = 100.0,
    sensitivities: Sequence[SensitivitySet | str | os.PathLike[str]] = (),
    sensitivity_share: float = 0.75,
    norms: str = "anchor",
    sweeps: int = 1,
    blocks: str | None = None,
    modules: Iterable[str] | None = None,
    mask: Mask = "attention_mask",
    keep_base: Iterable[str] = (),
    vocabulary: str = "error",
    walk_dtype: torch.dtype | str | None = None,
    hidden_memory: int | str = "4GB",
    hidden_dtype: torch.dtype | str | None = None,
    output: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    device: str = "cpu",
    recipe: Mapping[str, Any] | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
    report: Report = lambda line: None,
) -> MergeResult:
    """Sequential BMM: from input to output, each group of modules that share an input is solved on what the merged network reads there,

        W* = argmin_W  sum_t beta_t / n_t ||X~_t W^T - X_t W_t^T||_F^2 + lam ||W - W_a||_F^2,

    towards what each expert gives on its own inputs (`solve_drift`), before the modules after it are looked at. A module whose output is added
    straight to the residual stream S is aimed at what the expert's stream holds after it, so that it makes up for what the merged network's stream
    S~ has drifted before:

        W* = argmin_W  sum_t beta_t / n_t ||S~_t + X~_t W^T - S_t - X_t W_t^T||_F^2 + lam ||W - W_a||_F^2.

    `base`: a checkpoint (directory or hub id) that transformers can build, or a live model; `experts` as in `merge`. `batches[t]`: expert t's
    calibration data, as for `collect_grams`. Each expert and the merged network pass over them once; within a block, and only there, once
    more for each input. The blocks are found where a model has one longest list of modules of a class (transformers, timm), or named with
    `blocks` (a name or shell pattern). The model's own blocks are called; of each model one block at a time is held, read from its files.
    `anchor`, `anchor_parameters`, `grams`, `fishers`: the prior, as in `merge`; it also gives all that is no linear module. `alpha`, `scale`,
    `modules`, `keep_base`, `vocabulary`: as in `merge`. `task_weights`: "energy" (per input `1 / ||X_t U_t^T||^2`), None, or a number per
    expert. `fit_bias`: solve biases with their weights. `target`: "stream", or "module": all aim at what the expert's module gives.
    `mean_weight`: how much more the mean error of a task counts in linear modules, which shifts all of its predictions (`solve_drift`).
    `task_vector_samples`: how many calibration samples the task vector's Gram counts as beside those of a task; its share is n_0 / (n_0 + n), the
    less the more samples there are (`hybrid` of `solve_drift`). 0: the measured Grams alone.
    `sensitivities`: one SensitivitySet or path for each expert (`collect_sensitivity`, `bmm collect --sensitivity`): errors then count by how much
    the expert's predictions depend on them, `|| (X~_t W^T - X_t W_t^T) S_t^{1/2} ||`, in the energy weights too; `sensitivity_share` in [0, 1): of
    the metric S_t, the rest is the identity (see `bmm_engine.solving.weighted`).
    `norms`: "fit" solves gains and biases of normalisations too, feature by feature, instead of taking the
    anchor's. `sweeps`: walks, each with the result of the one before as its anchor.
    `walk_dtype`: of the models that are run (default: a live base's own, else float32). `hidden_memory`: hidden states kept in memory, in all, the
    rest in files; `hidden_dtype`: how they are kept (bfloat16 halves them).
    `output` and what follows: as in `merge`. What is finished is kept in `output` + ".walk", block by block: called again after it was killed,
    the merge goes on from there, to the same bits.

    Raises what `merge` and `collect_grams` raise.
    """
    options = SequentialOptions(
        fit_bias,
        target,
        mean_weight,
        task_vector_samples,
        norms,
        sweeps,
        blocks,
        mask,
        walk_dtype,
        hidden_memory,
        hidden_dtype,
    )
    calibration = [list(own) for own in batches]
    if len(calibration) != len(experts):
        raise ConfigError(
            f"{len(experts)} experts and {len(calibration)} calibration sets (batches); give one for each expert."
        )
    settings = MergeSettings(
        anchor=anchor,
        anchor_parameters=dict(anchor_parameters or {}),
        alpha=alpha,
        scale=scale,
        task_weights=given_task_weights(task_weights),
        sensitivity_share=sensitivity_share,
        device=device,
    )
    planned: dict[str, Any] = {
        "modules": [modules] if isinstance(modules, str) else list(modules) if modules is not None else None,
        "keep_base": list(keep_base),
        "vocabulary": vocabulary,
        "fishers": fishers,
        "local_files_only": local_files_only,
    }
    plan = plan_merge(base, experts, settings=settings, sensitivities=sensitivities, **planned)
    needed = "task_vectors" if isinstance(grams, str) else "data"
    prior = replace(settings, alpha=math.inf, scale=1.0, task_weights="none", gram_source=needed)
    anchor_plan = plan_merge(base, experts, grams=grams, settings=prior, **planned)
    anchor_plan.check_statistics()
    skeleton = Skeleton.of(base, plan.alignment, options, device)
    specs = output_specs(plan.alignment, dtype)
    destination = Path(output).expanduser().resolve() if output is not None else None
    writer = None
    if destination is not None:  # sharding and the output path are refused before any work
        writer = CheckpointWriter(
            destination, list(specs.values()), max_shard_bytes=max_shard_size, overwrite=overwrite
        )
    with ExitStack() as stack:
        folder = None
        if destination is not None:
            identity = _identity(plan, anchor_plan, calibration, options, skeleton)
            folder = stack.enter_context(_taken(walk_folder(destination), identity))
        prior_source = _anchor(anchor_plan, folder, progress)
        walks = [
            SequentialWalk(
                plan,
                skeleton,
                calibration,
                options,
                Sweep(folder and folder / f"sweep-{n + 1}"),
                report,
            )
            for n in range(options.sweeps)
        ]
        source = walk_all(walks, prior_source, stack, progress)
        result = MergeResult(plan, walks[-1].modules, inputs=walks[-1].inputs)
        if writer is None or folder is None:
            return replace(result, tensors=tensors_of(_written(source, Target(specs), progress), plan))
        record = recipe if recipe is not None else _recipe(plan, options)
        with writer, InputRecords(inputs_of(plan), torch.get_num_threads()) as inputs:
            _written(source, Target(specs, writer), progress)
            write_sidecars(writer, plan, inputs.result(), result.summary(), record, dtype)
            path = writer.commit()
        shutil.rmtree(folder)
        return replace(result, path=path)


def walk_all(walks: Sequence[SequentialWalk], anchor: TensorSource, stack: ExitStack, progress: bool | None) -> Merged:
    """Carry out sweeps, each with the result of the one before as its anchor; the result, which lasts as long as `stack`."""
    source: TensorSource = anchor
    for walk in walks:
        stack.callback(walk.sweep.close)
        walk.run(source, progress)
        source = Merged(source, walk.sweep)
    assert isinstance(source, Merged)
    return source


def walk_folder(output: Path) -> Path:
    """Where an unfinished sequential merge to `output` keeps its state."""
    return output.with_name(f"{output.name}.walk")


@contextmanager
def _taken(folder: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of an unfinished merge, for this process alone. Raises `ConfigError`, `OutputExistsError`, `OutputWriteError`."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = LockFile.open(folder / "lock", create=True)
    try:
        if not lock.acquire(0):
            raise OutputExistsError(
                f"{folder}: process {lock.holder(0)} is at work on this merge; wait for it, or choose another output."
            )
        open_folder(folder, identity)
        yield folder
    finally:
        lock.close()


def _anchor(plan: MergePlan, folder: Path | None, progress: bool | None) -> TensorSource:
    """The anchor's own merge, in float32 or wider: in memory, or in `folder`, where it may be already."""
    wide = float_dtype(plan.alignment.base.spec(n).dtype for n in plan.alignment.merged)
    specs = output_specs(plan.alignment, wide)
    label = f"anchor {plan.settings.anchor!r}"
    if folder is None:
        target = Target(specs)
        run_stream(MergeStream(plan, target.finish), target, progress, "anchor")
        return StateDictSource(target.tensors, label)
    path = folder / "anchor"
    if not path.exists():
        with CheckpointWriter(path, list(specs.values())) as writer:
            target = Target(specs, writer)
            run_stream(MergeStream(plan, target.finish), target, progress, "anchor")
            writer.commit()
    return Checkpoint.open(path, label=label)


def _written(source: TensorSource, target: Target, progress: bool | None) -> Target:
    """All tensors of the merge, in their final dtype."""
    for name, spec in track(list(target.specs.items()), "writing", show=progress):
        for rows in row_slabs(spec.shape):
            target.put(target.finish(Piece(name, source.load(name, rows), rows)))
    return target


def _identity(
    plan: MergePlan,
    anchor_plan: MergePlan,
    batches: Sequence[Sequence[Any]],
    options: SequentialOptions,
    skeleton: Skeleton,
) -> dict[str, Any]:
    """What decides the bits of the result."""
    settings, alignment = plan.settings, plan.alignment
    return as_texts(
        {
            "version": bmm_engine.__version__,
            "base": model_digest(*checkpoints_of(alignment.base)),
            "experts": [model_digest(*checkpoints_of(e.source)) for e in alignment.experts],
            "calibration": [values_digest(own) for own in batches],
            "anchor": {"name": settings.anchor, "parameters": repr(settings.anchor_parameters)},
            "grams": [own.fingerprints and sorted(own.fingerprints.items()) for own in anchor_plan.gram_sets],
            "alpha": repr(settings.alpha),
            "scale": repr(settings.scale),
            "task_weights": settings.task_weights,
            "modules": {m.name: m.stored_shape for g in plan.groups for m in g.members},
            "keep_base": alignment.kept,
            "blocks": skeleton.blocks,
            "fit_bias": options.fit_bias,
            "target": options.target,
            "mean_weight": options.mean_weight,
            "task_vector_samples": options.task_vector_samples,
            "sensitivities": [own.digest() for own in plan.sensitivities],
            "sensitivity_share": settings.sensitivity_share,
            "norms": options.norms,
            "mask": options.mask if isinstance(options.mask, str) else repr(type(options.mask)),
            "sweeps": options.sweeps,
            "walk_dtype": str(skeleton.dtype),
            "hidden_dtype": str(options.hidden_dtype),
            "device": settings.device,
        }
    )


def _recipe(plan: MergePlan, options: SequentialOptions) -> dict[str, Any]:
    """What was merged, and how, for the record of a merge that was called from Python."""
    known = {key: value for key, value in recipe_of(plan).items() if key not in ("gram_source", "hybrid_share")}
    return {
        **known,
        "mode": "sequential",
        "fit_bias": options.fit_bias,
        "sequential": {
            "target": options.target,
            "mean_weight": options.mean_weight,
            "task_vector_samples": options.task_vector_samples,
            "norms": options.norms,
            "sweeps": options.sweeps,
        },
    }

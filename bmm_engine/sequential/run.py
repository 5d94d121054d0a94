"""Merge in the order in which the network computes: every module is solved on the inputs that the merged modules below it really give it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import bmm_engine
from bmm_engine.checkpoint import Checkpoint, CheckpointWriter, InputRecords, StateDictSource, TensorSource
from bmm_engine.checkpoint.compose import checkpoints_of
from bmm_engine.checkpoint.dtypes import float_dtype
from bmm_engine.checkpoint.identity import as_texts, model_digest, values_digest
from bmm_engine.errors import BmmError, ConfigError, OutputExistsError, OutputWriteError
from bmm_engine.executors.devices import check_device
from bmm_engine.locks import LockFile
from bmm_engine.merging.merge import MergeResult, log_notes, run_stream, tensors_of
from bmm_engine.merging.output import (
    IN_MEMORY,
    Destination,
    Target,
    check_sidecars,
    inputs_of,
    output_specs,
    write_sidecars,
)
from bmm_engine.merging.plan import MergePlan, make_plan
from bmm_engine.merging.sources import Model, Models
from bmm_engine.merging.stream import MergeStream, Piece, row_slabs
from bmm_engine.progress import Report, track
from bmm_engine.recipe.keywords import settings_of, takes_settings
from bmm_engine.recipe.settings import MergeSettings
from bmm_engine.sequential.again import Remeasure, check_remeasure, measured_again
from bmm_engine.sequential.skeleton import Skeleton
from bmm_engine.sequential.state import (
    DIAGNOSTICS,
    LOCK,
    Merged,
    Sweep,
    check_folder,
    clean_folders,
    drop_other,
    finished_stages,
    open_folder,
    remove_folder,
    writing,
)
from bmm_engine.sequential.walk import SequentialWalk
from bmm_engine.statistics.sets import Fishers, Grams, Sensitivities, Statistics


@takes_settings("sequential")
def merge_sequential(
    base: Model,
    experts: Sequence[Model],
    batches: Sequence[Iterable[Any]],
    *,
    grams: Grams = "task_vectors",
    fishers: Fishers = (),
    sensitivities: Sensitivities = (),
    output: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    recipe: Mapping[str, Any] | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
    report: Report = lambda line: None,
    **options: Any,
) -> MergeResult:
    """Sequential BMM: from input to output, each group of modules that share an input is solved on what the merged network reads there,

        W* = argmin_W  sum_t beta_t / n_t ||X~_t W^T - X_t W_t^T||_F^2 + lam ||W - W_a||_F^2,

    towards what each expert gives on its own inputs (`solve_drift`), before the modules after it are looked at. A module whose output is added
    straight to the residual stream S is aimed at what the expert's stream holds after it, so that it makes up for what the merged network's stream
    S~ has drifted before:

        W* = argmin_W  sum_t beta_t / n_t ||S~_t + X~_t W^T - S_t - X_t W_t^T||_F^2 + lam ||W - W_a||_F^2.

    `base`: a checkpoint (directory or hub id) that transformers can build, or a live model; `experts` as in `merge`. `batches[t]`: expert t's
    calibration data, as for `collect_grams`. Each expert and the merged network pass over them once; within a block, and only there, once
    more for each input. Blocks are found where hidden states go through lists of them (`models/README.md`), or named with
    `blocks` (a name or shell pattern); without any the model is walked as a whole. The model's own blocks are called; of each model one block at a
    time is held, read from its files.
    `grams`, `fishers`: for anchors that need them, as in `merge`. `sensitivities`: one SensitivitySet or path for each expert
    (`collect_sensitivity`, `bmm collect --sensitivity`), for such anchors too: errors then count by how much the expert's predictions depend on them,
    `|| (X~_t W^T - X_t W_t^T) S_t^{1/2} ||`, in the energy weights (`1 / ||X_t U_t^T||^2` per input) too; "task_vectors": by `U_t U_t^T` instead.
    `output` and what follows: as in `merge`. What is finished is kept in `output` + ".walk", block by block: called again after it was killed,
    the merge goes on from there, to the same bits.

    Raises what `merge` and `collect_grams` raise.
    """
    settings = settings_of("sequential", options)
    statistics = Statistics.open(grams, fishers, sensitivities, batches)
    return walk_models(
        settings,
        Models.open(base, experts, local_files_only),
        statistics,
        Destination(None if output is None else Path(output), dtype, max_shard_size, overwrite, recipe),
        progress=progress,
        report=report,
    )


def walk_models(
    settings: MergeSettings,
    models: Models,
    statistics: Statistics,
    destination: Destination = IN_MEMORY,
    *,
    progress: bool | None = None,
    report: Report = lambda line: None,
    remeasure: Remeasure | None = None,
) -> MergeResult:
    """`merge_sequential` of what is open and checked: what keywords and recipes come to. `remeasure`: how, where the settings ask for it and do not
    say. Raises as it does."""
    check_device(settings.device)
    calibration = statistics.batches
    if len(calibration) != len(models.experts):
        raise ConfigError(
            f"{len(models.experts)} experts and {len(calibration)} calibration sets (batches); give one for each expert."
        )
    if settings.shrinkage:
        raise ConfigError(
            f"shrinkage = {settings.shrinkage}, but a walk corrects what merged modules disturb, and shrinks nothing; leave it out, or choose"
            " mode 'plain'."
        )
    if destination.path is not None:
        output = destination.path.expanduser().resolve()
        check_walk(output)
        destination = replace(destination, path=output)
    # A walk measures its own inputs, so modules are planned one by one; Grams are for anchors that need them.
    plan = make_plan(settings.but(gram_source="task_vectors"), models, replace(statistics, grams=()))
    prior = settings.anchor_alone("data" if statistics.grams else "task_vectors")
    of_anchor = statistics.of_anchor if "sensitivities" in settings.anchor_needs else ()
    anchor_plan = make_plan(prior, models, replace(statistics.alike(), anchor_sensitivities=of_anchor))
    anchor_plan.check_statistics()
    again = check_remeasure(plan, remeasure)
    log_notes(plan)
    skeleton = Skeleton.of(models, plan)
    specs = destination.specs(plan.alignment)
    writer, buffers = destination.writer(specs), plan.alignment.buffers
    if writer is not None:
        check_sidecars(plan, destination)
    with ExitStack() as stack:
        folder = None
        if destination.path is not None:
            identity = _identity(plan, anchor_plan, skeleton)
            folder = stack.enter_context(_taken(walk_folder(destination.path), identity, destination.overwrite))
        prior_source, diagnostics = _anchor(anchor_plan, folder, progress)
        walks = [
            SequentialWalk(plan, skeleton, calibration, Sweep(folder and folder / f"sweep-{n + 1}"), report)
            for n in range(settings.sequential.sweeps)
        ]
        source = walk_all(walks, prior_source, stack, progress, again)
        result = MergeResult(plan, walks[-1].modules, inputs=walks[-1].inputs, diagnostics=diagnostics)
        if writer is None or folder is None:
            return replace(result, tensors=tensors_of(_written(source, Target(specs, None, buffers), progress), plan))
        with writer, InputRecords(inputs_of(plan), torch.get_num_threads()) as inputs:
            _written(source, Target(specs, writer, buffers), progress)
            write_sidecars(writer, plan, inputs.result(), result.summary(), destination)
            path = writer.commit(then=lambda: remove_folder(folder, report))
        return replace(result, path=path)


def walk_all(
    walks: Sequence[SequentialWalk],
    anchor: TensorSource,
    stack: ExitStack,
    progress: bool | None,
    remeasure: Remeasure | None = None,
) -> Merged:
    """Carry out sweeps, each with the result of the one before as its anchor; the result, which lasts as long as `stack`. `remeasure`: measures the
    sensitivities of the later ones."""
    source: TensorSource = anchor
    for n, walk in enumerate(walks):
        stack.callback(walk.sweep.close)
        if n and remeasure is not None:
            walk.weigh_by(measured_again(walk.plan, source, remeasure))
        walk.run(source, progress, first=n == 0)
        source = Merged(source, walk.sweep)
    assert isinstance(source, Merged)
    return source


def walk_folder(output: Path) -> Path:
    """Where an unfinished sequential merge to `output` keeps its state."""
    return output.with_name(f"{output.name}.walk")


def check_walk(output: Path) -> None:
    """Refuse, before any work, a place where the state of a merge to `output` cannot lie. Raises `OutputExistsError`."""
    check_folder(walk_folder(output.expanduser().resolve()))


@contextmanager
def _taken(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> Iterator[Path]:
    """The folder of an unfinished merge, for this process alone; one that ends in an error before any stage is finished leaves none.

    Raises `ConfigError`, `OutputExistsError`, `OutputWriteError`."""
    check_folder(folder)
    lock = _locked(folder)
    while True:
        try:
            dropped = drop_other(folder, identity, overwrite)
        except BmmError:
            lock.close()
            raise
        if not dropped:
            break
        lock.close()
        lock = _locked(folder)
    try:
        open_folder(folder, identity)
        with writing(folder):
            clean_folders(folder)
        yield folder
    except OutputWriteError:
        raise  # a full disk: what there is of the anchor is of use
    except BmmError:
        if lock.is_at(folder / LOCK) and not finished_stages(folder):
            remove_folder(folder)
        raise
    finally:
        lock.close()


def _locked(folder: Path) -> LockFile:
    """The lock of a folder, taken; the folder is made where it is absent. Raises as `_taken`."""
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = LockFile.open(folder / LOCK, create=True)
        if not lock.acquire(0):
            holder = lock.holder(0)
            lock.close()
            raise OutputExistsError(
                f"{folder}: process {holder} is at work on this merge; wait for it, or choose another output."
            )
        if lock.is_at(folder / LOCK):
            return lock
        lock.close()  # its merge was finished, and the folder removed, between the two


def _anchor(
    plan: MergePlan, folder: Path | None, progress: bool | None
) -> tuple[TensorSource, dict[str, dict[str, float]]]:
    """The anchor's own merge, in float32 or wider, and what its rule found out: in memory, or in `folder`, where they may be already."""
    wide = float_dtype(plan.alignment.base.spec(n).dtype for n in plan.alignment.merged)
    specs = output_specs(plan.alignment, wide)
    label = f"anchor {plan.settings.anchor!r}"
    if folder is None:
        target = Target(specs, None, plan.alignment.buffers)
        stream = MergeStream(plan, target.finish)
        run_stream(stream, target, progress, "anchor")
        return StateDictSource(target.tensors, label), stream.diagnostics
    path = folder / "anchor"
    if not path.exists():
        with CheckpointWriter(path, list(specs.values())) as writer:
            target = Target(specs, writer, plan.alignment.buffers)
            stream = MergeStream(plan, target.finish)
            run_stream(stream, target, progress, "anchor")
            writer.write_json(DIAGNOSTICS, stream.diagnostics)
            writer.commit()
    return Checkpoint.open(path, label=label), json.loads((path / DIAGNOSTICS).read_text())


def _written(source: TensorSource, target: Target, progress: bool | None) -> Target:
    """All tensors of the merge, in their final dtype."""
    for name, spec in track(list(target.specs.items()), "writing", show=progress):
        for rows in row_slabs(spec.shape):
            target.put(target.finish(Piece(name, source.load(name, rows), rows)))
    return target


def _identity(plan: MergePlan, anchor_plan: MergePlan, skeleton: Skeleton) -> dict[str, Any]:
    """What decides the bits of the result."""
    settings, alignment, statistics = plan.settings, plan.alignment, plan.statistics
    walk = settings.sequential
    apart = ("sequential", "modules", "keep_base", "mode")
    algebra = {key: repr(value) for key, value in settings.options().items() if key not in apart}
    # Where hidden states are kept changes no bit.
    walked = {key: repr(value) for key, value in walk if key not in ("blocks", "mask", "walk_dtype", "hidden_memory")}
    walked["remeasure"] = repr(bool(walk.remeasure))
    return as_texts(
        {
            "version": bmm_engine.__version__,
            "base": model_digest(*checkpoints_of(alignment.base)),
            "experts": [model_digest(*checkpoints_of(e.source)) for e in alignment.experts],
            "calibration": [values_digest(own) for own in statistics.batches],
            "grams": [g.fingerprints and sorted(g.fingerprints.items()) for g in anchor_plan.statistics.grams],
            "sensitivities": [own.digest() for own in statistics.sensitivities]
            or ("task_vectors" if statistics.task_vectors_weigh else []),
            "anchor_sensitivities": [own.digest() for own in anchor_plan.statistics.of_anchor],
            **algebra,
            **walked,
            "modules": {m.name: m.stored_shape for g in plan.groups for m in g.members},
            "keep_base": alignment.kept,
            "blocks": list(skeleton.chains),
            "mask": walk.mask if isinstance(walk.mask, str) else repr(type(walk.mask)),
            "walk_dtype": str(skeleton.dtype),
        }
    )

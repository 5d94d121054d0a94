"""Measure one checkpoint on its calibration data: Grams, Fisher information, sensitivities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from bmm_engine.checkpoint import Checkpoint, TensorSource
from bmm_engine.errors import CollectionError, ConfigError, EmptyCalibrationError, NonFiniteGramError
from bmm_engine.evaluators.heads import with_head
from bmm_engine.models.fitted_inputs import needs_decoder_inputs, taken_inputs, with_decoder_inputs
from bmm_engine.models.inputs import check_inputs
from bmm_engine.pipeline.models import live_model
from bmm_engine.recipe.sections import CalibrationRecipe
from bmm_engine.statistics.calibration import TARGET, CalibrationData
from bmm_engine.statistics.collect import collect_grams
from bmm_engine.statistics.fisher import FisherSet, collect_fisher
from bmm_engine.statistics.grams import GramSet
from bmm_engine.statistics.sensitivity import SensitivitySet, collect_sensitivity


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
    source = Checkpoint.open(model, local_files_only=local_files_only) if isinstance(model, str) else model
    live, path = live_model(source, dtype=options.dtype, device=device)
    batches = batches_of(data, path, options, live)
    with naming(path, data):
        found = collect_grams(live, batches, modules=modules, calibration=data.describe(), progress=progress)
    return replace(found, origin=str(path))


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
    batches = batches_of(data, path, options, live)
    with naming(path, data):
        return collect_fisher(
            live,
            batches,
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
    prepare: Callable[[nn.Module], object] = lambda live: None,
) -> SensitivitySet:
    """The same for its sensitivities. `head`: a bare encoder's own, a safetensors file, on what `pooling` ("mean", "cls") makes of its output.
    `prepare`: called with the live model (without that head) before it is run. Raises as `collect_sensitivity`."""
    source = Checkpoint.open(model, local_files_only=local_files_only) if isinstance(model, str) else model
    # A head of its own reads no pooler; that the file lacks one is no news.
    live, path = live_model(source, dtype=options.dtype, device=device, reports=head is None)
    prepare(live)
    batches = batches_of(data, path, options, live)
    with naming(path, data):
        return collect_sensitivity(
            live,
            batches,
            logits=None if head is None else with_head(live, head, pooling).logits,
            modules=modules,
            calibration=data.describe(),
            progress=progress,
        )


def batches_of(data: CalibrationData, path: Path, options: CalibrationRecipe, model: nn.Module) -> list[Any]:
    """Calibration data as model inputs, made by the tokenizer or processor at `path`, once all of them fit the `model` that is to read them
    (which may be on the meta device). Raises `ConfigError`, and what making them raises."""
    made, ready = (
        data.batches(path, batch_size=options.batch_size, max_length=options.max_length),
        data.inputs is not None,
    )
    batches = [batch if ready else _taken(model, batch) for batch in made]
    for batch in batches:
        check_inputs(model, batch, str(data.source), ready=ready)
    return [with_decoder_inputs(model, batch) if needs_decoder_inputs(model, batch) else batch for batch in batches]


def _taken(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of texts as the model takes it; their targets are what its decoder reads. Raises `ConfigError` for targets without a decoder."""
    taken = taken_inputs(model, batch)
    targets = {key.removeprefix(TARGET): value for key, value in batch.items() if key.startswith(TARGET)}
    if not targets:
        return taken
    if not needs_decoder_inputs(model, taken):
        raise ConfigError(
            f"calibration: target_field: {type(model).__name__} has no decoder beside its encoder that would make targets; leave it out."
        )
    return with_decoder_inputs(model, taken, targets)


@contextmanager
def naming(path: Path, data: CalibrationData) -> Iterator[None]:
    """What goes wrong while a model runs, said of it and of the file that it reads."""
    where = f"{path} on {data.source}"
    try:
        yield
    except NonFiniteGramError as error:
        raise NonFiniteGramError(f"{where}: {error}", module=error.module, count=error.count) from error
    except (CollectionError, EmptyCalibrationError) as error:
        raise type(error)(f"{where}: {error}") from error

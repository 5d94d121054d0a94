"""Where a merge goes: final dtypes, the checkpoint's side files, its record and card."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmm_engine.checkpoint import (
    RECORD_FILENAME,
    Checkpoint,
    CheckpointWriter,
    TensorSource,
    TensorSpec,
    merge_record,
    model_card,
)
from bmm_engine.checkpoint.compose import checkpoints_of, root_checkpoint
from bmm_engine.checkpoint.dtypes import parse_dtype
from bmm_engine.checkpoint.ownership import CARD_FILENAME
from bmm_engine.checkpoint.sidecars import sidecar_files
from bmm_engine.checkpoint.tokenizer import with_template
from bmm_engine.checkpoint.tokens import tokenizer_files, tokenizer_folder
from bmm_engine.errors import NonFiniteWeightError
from bmm_engine.merging.align import Alignment
from bmm_engine.merging.plan import MergePlan
from bmm_engine.merging.stream import Piece

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """Where a merge goes, and in what form. `path` None: it stays in memory. `recipe`: what its record says was asked for (None: the plan).
    `chat_template`: instead of the base's."""

    path: Path | None = None
    dtype: torch.dtype | str | None = None
    max_shard_size: int | str = "5GB"
    overwrite: bool = False
    recipe: Mapping[str, Any] | None = None
    chat_template: str | None = None

    def specs(self, alignment: Alignment) -> dict[str, TensorSpec]:
        """The tensors that are to be written. Raises `ConfigError`."""
        return output_specs(alignment, self.dtype)

    def writer(self, specs: Mapping[str, TensorSpec]) -> CheckpointWriter | None:
        """Of the checkpoint; None for a merge in memory. Refuses sharding and the path before any work."""
        if self.path is None:
            return None
        return CheckpointWriter(
            self.path, list(specs.values()), max_shard_bytes=self.max_shard_size, overwrite=self.overwrite
        )


IN_MEMORY = Destination()


@dataclass
class Target:
    """Where finished pieces go: `finish` casts one to its final dtype and sees that nothing overflows, `put` writes or keeps it. `buffers`: names
    of no weights, which may hold anything (-inf in a mask)."""

    specs: dict[str, TensorSpec]
    writer: CheckpointWriter | None = None
    buffers: Collection[str] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def finish(self, piece: Piece) -> Piece:
        """The piece in its final dtype, on the CPU. Raises `NonFiniteWeightError` (tensor, count) for values that the dtype cannot hold."""
        spec = self.specs[piece.name]
        tensor = piece.tensor.to("cpu", spec.dtype)
        if piece.name in self.buffers:
            return replace(piece, tensor=tensor)
        if spec.dtype.is_floating_point and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            count = int((~torch.isfinite(tensor.float())).sum())
            if count:
                raise NonFiniteWeightError(
                    f"merged tensor {piece.name!r}: {count} values do not fit {spec.dtype} or are NaN. Write a wider dtype (dtype:"
                    " float32), or use a larger alpha."
                )
        return replace(piece, tensor=tensor)

    def put(self, piece: Piece) -> None:
        """Take a finished piece."""
        spec, tensor = self.specs[piece.name], piece.tensor
        if self.writer is not None:
            self.writer.write(piece.name, tensor, piece.rows)
        elif piece.rows is None:
            self.tensors[piece.name] = tensor
        else:
            if piece.name not in self.tensors:
                self.tensors[piece.name] = torch.empty(spec.shape, dtype=spec.dtype)
            self.tensors[piece.name][piece.rows] = tensor


def output_specs(alignment: Alignment, dtype: torch.dtype | str | None) -> dict[str, TensorSpec]:
    """The tensors of the merged checkpoint: the base's names and shapes, its dtypes or `dtype` for floats. Raises `ConfigError`."""
    chosen = parse_dtype(dtype)
    specs = {}
    for name in alignment.base.names():
        spec = alignment.base.spec(name)
        specs[name] = replace(spec, dtype=chosen) if chosen is not None and spec.dtype.is_floating_point else spec
    return specs


def inputs_of(plan: MergePlan) -> list[tuple[str, TensorSource]]:
    """(role, source) of all files that a merge reads."""
    alignment = plan.alignment
    base = alignment.base if alignment.hosted is None else alignment.hosted.base
    roles = [("base", base), *((f"expert {i + 1}", e.source) for i, e in enumerate(alignment.experts))]
    return [(role, own) for role, source in roles for own in checkpoints_of(source)]


def check_sidecars(plan: MergePlan, destination: Destination) -> None:
    """Raise, before any work, for files beside the base that cannot come along, and for a tokenizer that cannot be made. Raises `CheckpointError`,
    `ConfigError`."""
    files = root_checkpoint(plan.alignment.base)
    if files is not None and files.path.is_dir():
        _changed(plan, files, destination.chat_template)
        sidecar_files(files.path, files.config)


def write_sidecars(
    writer: CheckpointWriter,
    plan: MergePlan,
    inputs: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    destination: Destination,
) -> None:
    """Config, tokenizer and generation files of the base, or of the host, `bmm_merge.json` with the hashes of all inputs, and the model card."""
    alignment = plan.alignment
    base, config = alignment.base, alignment.base.config
    if config is not None:
        writer.write_json("config.json", _with_dtype(config, parse_dtype(destination.dtype)))
    if (files := root_checkpoint(base)) is not None:
        if (donor := _donor(plan)) is not None:
            logger.warning("%s: has no tokenizer; that of %s is put beside the output", base.label, donor[0])
        writer.copy_sidecars(files, changed=_changed(plan, files, destination.chat_template))
    record = merge_record(recipe_of(plan) if destination.recipe is None else destination.recipe, inputs, summary)
    write_record_and_card(writer, record, base if alignment.hosted is None else alignment.hosted.host)


def _donor(plan: MergePlan) -> tuple[str, Path] | None:
    """The first expert that has a tokenizer, where the base has none, and where that lies."""
    base = plan.alignment.base
    if getattr(base, "tokenizer", None) is not None or tokenizer_folder(base) is not None:
        return None
    found = ((e.label, tokenizer_folder(e.source)) for e in plan.alignment.experts)
    return next(((label, folder) for label, folder in found if folder is not None), None)


def _changed(plan: MergePlan, files: Checkpoint, template: str | None) -> dict[str, bytes | None]:
    """Of the files beside the base's weights those that the output has otherwise: the tokenizer where its vocabulary is another, or where the base
    has none and an expert has; the chat template that was asked for."""
    base, changed = plan.alignment.base, {}
    union = getattr(base, "tokenizer", None)
    if union is not None:
        changed = union.files(files.path)
    elif (donor := _donor(plan)) is not None and files.path.is_dir():
        changed = tokenizer_files(donor[1], files.path)
    if template is None:
        return changed
    config = changed.get("tokenizer_config.json")
    return {**changed, **with_template(files.path, template, config)}


def write_record_and_card(writer: CheckpointWriter, record: Mapping[str, Any], base: TensorSource) -> None:
    """The last two files: the record, which lists all of them, and the model card."""
    listed = {**record, "files": sorted({*writer.files, RECORD_FILENAME, CARD_FILENAME})}
    writer.write_json(RECORD_FILENAME, listed)
    architecture = ((base.config or {}).get("architectures") or [None])[0]
    card = model_card(record, name=f"{Path(base.label).name}, merged", architecture=architecture)
    writer.write_text(CARD_FILENAME, card)


def recipe_of(plan: MergePlan) -> dict[str, Any]:
    """A plan as a recipe, for the record of a merge that was called from Python."""
    settings = plan.settings
    algebra = settings.plain()
    if settings.mode == "sequential":
        algebra.pop("gram_source")
    return {
        "base": plan.alignment.base.label,
        "experts": [{"model": e.label} for e in plan.alignment.experts],
        "anchor": {"name": settings.anchor, **settings.anchor_parameters},
        **algebra,
        "output_weights": plan.statistics.output_weights,
    }


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The config with its dtype entry true to the weights."""
    config = dict(config)
    if dtype is not None:
        key = "dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"
        config[key] = str(dtype).removeprefix("torch.")
    return config

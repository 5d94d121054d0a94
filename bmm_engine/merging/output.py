"""Where a merge goes: final dtypes, the checkpoint's side files, its record and card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmm_engine.checkpoint import CheckpointWriter, TensorSource, TensorSpec, merge_record, model_card
from bmm_engine.checkpoint.compose import checkpoints_of, root_checkpoint
from bmm_engine.errors import ConfigError, NonFiniteWeightError
from bmm_engine.merging.align import Alignment
from bmm_engine.merging.plan import MergePlan
from bmm_engine.merging.stream import Piece


@dataclass
class Target:
    """Where finished pieces go: `finish` casts one to its final dtype and sees that nothing overflows, `put` writes or keeps it."""

    specs: dict[str, TensorSpec]
    writer: CheckpointWriter | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def finish(self, piece: Piece) -> Piece:
        """The piece in its final dtype, on the CPU. Raises `NonFiniteWeightError` (tensor, count) for values that the dtype cannot hold."""
        spec = self.specs[piece.name]
        tensor = piece.tensor.to("cpu", spec.dtype)
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


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """float32, float16, bfloat16 or float64, by name or as torch's object; None stays None. Raises `ConfigError`."""
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ConfigError(f"dtype must be float32, bfloat16, float16 or float64, not {dtype!r}.")
    return found


def inputs_of(plan: MergePlan) -> list[tuple[str, TensorSource]]:
    """(role, source) of all files that a merge reads."""
    alignment = plan.alignment
    roles = [("base", alignment.base), *((f"expert {i + 1}", e.source) for i, e in enumerate(alignment.experts))]
    return [(role, own) for role, source in roles for own in checkpoints_of(source)]


def write_sidecars(
    writer: CheckpointWriter,
    plan: MergePlan,
    inputs: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    recipe: Mapping[str, Any] | None,
    dtype: torch.dtype | str | None,
) -> None:
    """Config, tokenizer and generation files of the base, `bmm_merge.json` with the hashes of all inputs, and the model card."""
    base = plan.alignment.base
    config = base.config
    if config is not None:
        writer.write_json("config.json", _with_dtype(config, parse_dtype(dtype)))
    if (files := root_checkpoint(base)) is not None:
        writer.copy_sidecars(files)
    record = merge_record(recipe if recipe is not None else recipe_of(plan), inputs, summary)
    writer.write_json("bmm_merge.json", record)
    architecture = ((config or {}).get("architectures") or [None])[0]
    writer.write_text(
        "README.md", model_card(record, name=f"{Path(base.label).name}, merged", architecture=architecture)
    )


def recipe_of(plan: MergePlan) -> dict[str, Any]:
    """A plan as a recipe, for the record of a merge that was called from Python."""
    settings = plan.settings
    return {
        "base": plan.alignment.base.label,
        "experts": [{"model": e.label} for e in plan.alignment.experts],
        "anchor": {"name": settings.anchor, **(settings.anchor_parameters or {})},
        "gram_source": settings.gram_source,
        "hybrid_share": settings.hybrid_share if settings.gram_source == "hybrid" else None,
        "alpha": settings.alpha,
        "scale": settings.scale,
        "task_weights": settings.task_weights
        if isinstance(settings.task_weights, str)
        else list(settings.task_weights),
        "output_weights": "sensitivity" if plan.sensitivities else "none",
        "sensitivity_share": settings.sensitivity_share if plan.sensitivities else None,
        "fit_bias": settings.fit_bias,
    }


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The config with its dtype entry true to the weights."""
    config = dict(config)
    if dtype is not None:
        key = "dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"
        config[key] = str(dtype).removeprefix("torch.")
    return config

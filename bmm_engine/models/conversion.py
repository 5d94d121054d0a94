"""What a version of transformers fuses or splits between files and live models, step by step: the same tensors in the other layout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bmm_engine.progress import quiet_transformers

if TYPE_CHECKING:
    from torch import nn

Stored = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Conversion:
    """Tensors of the names `inputs` become those of the names `outputs` (with shape and dtype); `run` does it."""

    inputs: tuple[str, ...]
    outputs: Stored
    run: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def to_files(model: nn.Module, stored: Stored) -> list[Conversion]:
    """Of tensors under live names: what `save_pretrained` writes otherwise than one by one. `stored`: name -> shape and dtype."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, apply_converters, revert_weight_conversion
    except ImportError:  # version 4, which has one layout
        return []
    if not isinstance(model, PreTrainedModel):
        return []
    own = get_model_conversion_mapping(model, add_legacy=False)[::-1]
    backwards: Any = [entry.reverse_transform() for entry in own if isinstance(entry, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in stored:
        renamed, pattern = apply_converters(name, backwards)
        if pattern is not None:
            groups.setdefault(renamed, []).append(name)
    return _tried(groups.values(), stored, lambda tensors: revert_weight_conversion(model, dict(tensors)))


def to_live(model: nn.Module, stored: Stored) -> list[Conversion]:
    """Of tensors under the names of files: what loading makes of them otherwise than one by one."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:
        return []
    if not isinstance(model, PreTrainedModel):
        return []
    own = get_model_conversion_mapping(model)
    renamings: Any = [entry for entry in own if isinstance(entry, WeightRenaming)]
    converters: Any = [entry for entry in own if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    live = dict.fromkeys(model.state_dict(keep_vars=True), True)

    def place(name: str) -> tuple[str, str | None]:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, live)

    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Any] = {}
        for name in sorted(tensors, key=dot_natural_key):
            renamed, pattern = place(name)
            entry = found.setdefault(renamed, copy.deepcopy(by_pattern[str(pattern)]))
            entry.add_tensor(renamed, name, pattern, tensors[name])
        made = {}
        for renamed, entry in found.items():
            for target, tensor in entry.convert(renamed, model=model, config=model.config).items():
                made[target] = tensor[0] if isinstance(tensor, list) else tensor
        return made

    groups: dict[str, list[str]] = {}
    for name in stored:
        renamed, pattern = place(name)
        if pattern is not None and renamed in live:
            groups.setdefault(renamed, []).append(name)
    return _tried(groups.values(), stored, run)


def _tried(
    groups: Iterable[list[str]], stored: Stored, run: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> list[Conversion]:
    """Those that can be done, as they turn out without memory."""
    found = []
    for names in groups:
        try:
            with quiet_transformers(reports=False):
                made = run({n: torch.empty(stored[n][0], dtype=stored[n][1], device="meta") for n in names})
        except (
            Exception
        ):  # of a group that is not whole, an operation may raise anything; then its names stay as they are
            continue
        outputs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}
        found.append(Conversion(tuple(names), outputs, run))
    return found

"""Tensors that transformers fuses or splits between a checkpoint's files and the live model: a mixture's experts, some queries, keys and values."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fusion:
    """What transformers makes of `sources` (names in the files), by one of its own conversions: `targets` (names in the live model)."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    _first: str
    _patterns: tuple[str, ...]
    _converter: Any
    _model: Any

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors`: those of all sources, by name. Returns those of the targets."""
        converter = copy.deepcopy(self._converter)
        for name, pattern in zip(self.sources, self._patterns, strict=True):
            converter.add_tensor(self._first, name, pattern, tensors[name])
        found = converter.convert(self._first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def fusions(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[Fusion]:
    """The conversions that `model` (its parameters may be on the meta device) needs of tensors in files, by name and shape, beyond another name."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # version 4 fuses nothing
        return []
    if not isinstance(model, PreTrainedModel):
        return []
    steps: Any = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    if not converters:
        return []
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is not None and target in state and name not in state:
            groups.setdefault(target, []).append((name, pattern))
    return [_fusion(model, first, own, by_pattern[own[0][1]], shapes) for first, own in groups.items()]


def _fusion(
    model: Any, first: str, own: list[tuple[str, str]], converter: Any, shapes: Mapping[str, tuple[int, ...]]
) -> Fusion:
    sources, patterns = zip(*own, strict=True)
    made = Fusion(sources, (), first, patterns, converter, model)
    targets = made({name: torch.empty(shapes[name], device="meta") for name in sources})
    return Fusion(sources, tuple(targets), first, patterns, converter, model)

"""Opening what a merge is given: a full model as it is, an expert that is a LoRA adapter over its base."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from bmm_engine.checkpoint import Checkpoint, TensorSource, is_adapter, open_adapter, open_source
from bmm_engine.errors import CheckpointError, ConfigError
from bmm_engine.models.architecture import stored_layout

logger = logging.getLogger(__name__)

# Building the architecture takes a while, and all adapters of a base need the same of it.
_options: WeakKeyDictionary[Checkpoint, dict[str, Any]] = WeakKeyDictionary()

Model = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module | TensorSource


@dataclass(frozen=True)
class Models:
    """Base and experts of a merge, each opened once. `live`: the base itself, where it was given as a live model."""

    base: TensorSource
    experts: tuple[TensorSource, ...]
    live: nn.Module | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", _told_apart(self.experts))

    @classmethod
    def open(cls, base: Model, experts: Sequence[Model], local_files_only: bool = False) -> Models:
        """Raises `ConfigError` where there are no experts, and what opening them raises."""
        if not experts:
            raise ConfigError("no experts: give at least one fine-tuned model.")
        root = open_model(base, "base", local_files_only)
        sources = tuple(open_expert(e, root, f"expert {i}", local_files_only) for i, e in enumerate(experts))
        return cls(root, sources, base if isinstance(base, nn.Module) else None)


def _told_apart(experts: tuple[TensorSource, ...]) -> tuple[TensorSource, ...]:
    """By their labels, which errors and records go by: of different ones that are called alike, each gets its number to it."""
    places: dict[str, set[Any]] = {}
    for expert in experts:
        places.setdefault(expert.label, set()).add(getattr(expert, "path", id(expert)))
    found = []
    for number, expert in enumerate(experts):
        own = expert
        if len(places[expert.label]) > 1:
            own = copy.copy(expert)
            own.label = f"{expert.label} (expert {number})"
        found.append(own)
    return tuple(found)


def open_model(model: Model, role: str, local_files_only: bool = False) -> TensorSource:
    """A full model as a source; `role` names it in messages where it has no path."""
    if isinstance(model, (str, os.PathLike)):
        return Checkpoint.open(os.fspath(model), local_files_only=local_files_only)
    label = f"the {role} ({type(model).__name__})" if isinstance(model, (nn.Module, Mapping)) else None
    return open_source(model, label)


def open_expert(model: Model, base: TensorSource, role: str, local_files_only: bool = False) -> TensorSource:
    """An expert as a source: a full model, or a PEFT adapter in a directory or on the hub, applied to `base`."""
    if not isinstance(model, (str, os.PathLike)) or not is_adapter(os.fspath(model), local_files_only=local_files_only):
        return open_model(model, role, local_files_only)
    return open_adapter(os.fspath(model), base, local_files_only=local_files_only, **adapter_options(base))


def adapter_options(base: TensorSource) -> dict[str, Any]:
    """What `open_adapter` should know of a base whose architecture is known: where live names differ, which weights are transposed."""
    if not isinstance(base, Checkpoint) or base.config is None:
        return {}
    if base not in _options:
        try:
            live_names, transposed = stored_layout(base.path, base.shapes())
            _options[base] = {"live_names": live_names, "transposed": transposed}
        except CheckpointError as error:  # an architecture of its own: names and shapes in the files then have to tell
            logger.info("%s: %s", base.label, error)
            _options[base] = {}
    return _options[base]

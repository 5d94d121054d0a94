"""Models stacked from runs of layers of others: output layer `i` is layer `j` of some source."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from bmm_engine.checkpoint.config_differences import completed
from bmm_engine.checkpoint.reader import Checkpoint
from bmm_engine.checkpoint.source import TensorSource, TensorSpec, missing_tensor
from bmm_engine.errors import ConfigError

# The first number among the parts of a name is the layer.
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
# Outside the layers, what stands before them by its name; all else (final norm, heads, pooler) stands after them.
_BEFORE = re.compile(
    r"embed|(^|\.)(wte|wpe|shared|project_in|ln_pre|pre_layrnorm)(\.|$)|position|patch|(cls|class)_token"
)
_AFTER = re.compile(r"(^|\.)(embed_out|lm_head|project_out)(\.|$)")
# Where a config says how many layers there are.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class LayerRange:
    """Layers `start <= j < stop` of a model. None, at an end of a stack: that model then only gives what stands before or after the layers."""

    source: TensorSource
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def checkpoints_of(source: TensorSource) -> Iterator[TensorSource]:
    """The sources with files of their own under a view, each once: those of its `inputs`, else the source itself."""
    seen: list[TensorSource] = []
    waiting = [source]
    while waiting:
        current = waiting.pop(0)
        inputs = getattr(current, "inputs", None)
        if inputs is not None:
            waiting = [*inputs, *waiting]
        elif not any(current is other for other in seen):
            seen.append(current)
            yield current


def root_checkpoint(source: TensorSource) -> Checkpoint | None:
    """The checkpoint whose config and files a view's come from: that of its first input, or of the base under an adapter."""
    current: Any = source
    while current is not None and not isinstance(current, Checkpoint):
        inputs = getattr(current, "inputs", None)
        current = inputs[0] if inputs else getattr(current, "base", None)
    return current


class LayerStack:
    """Where a model keeps its layers: the part of their tensors' names before the number, and how many there are."""

    def __init__(self, source: TensorSource):
        """Raises ConfigError for a model without numbered layers, or with several stacks of which its config does not tell the one."""
        counts: dict[str, int] = {}
        for name in source.names():
            if found := _LAYER.search(name):
                prefix = name[: found.start(1)]
                counts[prefix] = max(counts.get(prefix, 0), int(found[1]) + 1)
        said = layer_count(source.config)
        fitting = [prefix for prefix, count in counts.items() if count == said] or list(counts)
        if len(fitting) != 1:
            stacks = ", ".join(f"{prefix}0..{count - 1}" for prefix, count in counts.items())
            raise ConfigError(
                f"{source.label}: slices need one stack of numbered layers, this model has {stacks or 'none'}; merge it whole"
            )
        self.prefix = fitting[0]
        self.count = counts[self.prefix]

    def split(self, name: str) -> tuple[int, str] | None:
        """Layer and rest of a tensor's name, `(3, ".mlp.weight")`; None outside the layers."""
        found = _LAYER.search(name)
        if found is None or name[: found.start(1)] != self.prefix:
            return None
        return int(found[1]), name[found.end(1) :]


class StackedSource(TensorSource):
    """The layers of `parts` one after another, numbered anew; a layer may come several times.

    Tensors before the layers (embeddings) come from the first part's model, those after them (final norm, head) from the last part's;
    which is which is told by their names. The config is the first model's with the new number of layers, lists with an entry for each
    layer composed alike.

    Raises ConfigError for a range outside a model's layers and for models that name their layers differently.
    """

    def __init__(self, parts: Sequence[LayerRange], label: str | None = None):
        self.parts = tuple(parts)
        if not self.parts:
            raise ConfigError("a stack of layers needs at least one slice; give a model and its range of layers")
        self.label = label or " + ".join(f"{p.source.label}[{p.start}:{p.stop}]" for p in self.parts)
        stacks = [LayerStack(part.source) for part in self.parts]
        self.prefix = stacks[0].prefix
        for part, stack in zip(self.parts, stacks, strict=True):
            if not 0 <= part.start <= part.stop <= stack.count:
                raise ConfigError(
                    f"{part.source.label}: layers [{part.start}, {part.stop}] are not a range within its {stack.count} layers; the first is 0,"
                    " and the end is not included"
                )
            if stack.prefix != self.prefix:
                raise ConfigError(
                    f"{part.source.label} calls its layers {stack.prefix}N, {self.parts[0].source.label} {self.prefix}N; stack models of one"
                    " architecture, saved in the same way"
                )
        if not any(len(part) for part in self.parts):
            raise ConfigError(f"{self.label}: a stack of no layers; give at least one slice a range of some")
        self._stack = stacks[0]
        self._own_aliases: dict[str, str] = {}
        self._holder: dict[str, tuple[TensorSource, str]] = dict(self._map())

    @property
    def inputs(self) -> tuple[TensorSource, ...]:
        """The models under this view, each once, the first part's first."""
        return tuple({id(part.source): part.source for part in self.parts}.values())

    def names(self) -> tuple[str, ...]:
        return tuple(self._holder)

    def __contains__(self, name: object) -> bool:
        return name in self._holder or name in self._own_aliases

    def spec(self, name: str) -> TensorSpec:
        source, own = self._find(name)
        return replace(source.spec(own), name=name)

    def load(self, name: str, rows: slice | None = None) -> torch.Tensor:
        source, own = self._find(name)
        return source.load(own, rows)

    @property
    def aliases(self) -> dict[str, str]:
        return self._own_aliases

    @cached_property
    def config(self) -> dict[str, Any] | None:
        configs = [_with_kinds(part.source.config) for part in self.parts]
        if configs[0] is None:
            return None
        config: dict[str, Any] = copy.deepcopy(configs[0])
        _stack_layers(config, [(c or {}, part) for c, part in zip(configs, self.parts, strict=True)])
        untied = [
            t for t in self.parts[0].source.aliases if self._stack.split(t) is None and t not in self._own_aliases
        ]
        if untied and "tie_word_embeddings" in config:
            config["tie_word_embeddings"] = False
        return config

    def _map(self) -> Iterator[tuple[str, tuple[TensorSource, str]]]:
        first, last = self.parts[0].source, self.parts[-1].source
        for name in first.names():
            if self._stack.split(name) is None and stands_before(name):
                yield name, (first, name)
        offset = 0
        for part in self.parts:
            for name in (*part.source.names(), *part.source.aliases):
                found = self._stack.split(name)
                if found is not None and part.start <= found[0] < part.stop:
                    yield f"{self.prefix}{offset + found[0] - part.start}{found[1]}", (part.source, name)
            offset += len(part)
        for name in last.names():
            if self._stack.split(name) is None and not stands_before(name):
                yield name, (last, name)
        yield from self._tied(first, last)

    def _tied(self, first: TensorSource, last: TensorSource) -> Iterator[tuple[str, tuple[TensorSource, str]]]:
        """Names that the last model ties: tied here too where the first model ties them, else tensors of their own."""
        for source in (first, last):
            for tied, holder in source.aliases.items():
                if self._stack.split(tied) is not None or tied in self._own_aliases:
                    continue
                owner = first if stands_before(tied) else last
                if tied in owner.names():
                    continue
                if first.aliases.get(tied) == holder:
                    self._own_aliases[tied] = holder
                elif source is owner:
                    yield tied, (owner, tied)

    def _find(self, name: str) -> tuple[TensorSource, str]:
        try:
            return self._holder[self._own_aliases.get(name, name)]
        except KeyError:
            raise missing_tensor(name, self.label, self._holder) from None


def layer_count(config: dict[str, Any] | None) -> int | None:
    """The number of layers that a config names, at its top or in its `text_config`."""
    for part in (config, (config or {}).get("text_config")):
        for key in LAYER_COUNTS:
            if isinstance(part, dict) and isinstance(part.get(key), int):
                return int(part[key])
    return None


def stands_before(name: str) -> bool:
    """Whether a tensor outside the layers belongs before them, as its name tells."""
    return bool(_BEFORE.search(name.lower())) and not _AFTER.search(name.lower())


def _with_kinds(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """With the lists of kinds of layers that the architecture makes of a period (`layer_types`), where the layers are of several kinds: a stack has
    them in another order."""
    whole = completed(config) if config is not None else None
    if whole is None or config is None:
        return config
    found: dict[str, Any] = dict(config)
    for key, value in whole.items():
        if key == "text_config" and isinstance(value, dict) and isinstance(config.get(key), dict):
            found[key] = _kinds_in(config[key], value)
    return _kinds_in(found, whole)


def _kinds_in(config: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    count = layer_count(whole)
    lists = {
        key: value
        for key, value in whole.items()
        if "layer" in key and key not in config and isinstance(value, list) and len(value) == count
    }
    return config | {key: value for key, value in lists.items() if any(own != value[0] for own in value)}


def _stack_layers(config: dict[str, Any], parts: Sequence[tuple[dict[str, Any], LayerRange]]) -> None:
    """Correct, in place, the count of layers and lists with an entry for each layer."""
    count = layer_count(config)
    for key, value in config.items():
        if key == "text_config" and isinstance(value, dict):
            _stack_layers(value, [(own.get(key) or {}, part) for own, part in parts])
        elif key in LAYER_COUNTS and value == count:
            config[key] = sum(len(part) for _, part in parts)
        elif "layer" in key and isinstance(value, list) and len(value) == count:
            config[key] = [entry for own, part in parts for entry in (own.get(key) or value)[part.start : part.stop]]

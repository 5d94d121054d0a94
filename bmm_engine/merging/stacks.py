"""Are the layers of a stack what its config makes of them? Layers that alternate by a period, or by a list, are of several kinds."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from bmm_engine.checkpoint import TensorSource
from bmm_engine.checkpoint.compose import LayerStack, StackedSource, root_checkpoint
from bmm_engine.errors import ConfigError, shown
from bmm_engine.models.bounds import Held
from bmm_engine.models.building import UnknownArchitectureError, meta_model

logger = logging.getLogger(__name__)

# What differs from layer to layer of one kind: its number, and what only training uses.
_OWN = re.compile(r"idx|index|layer_(id|number)|drop|training|init")


def check_stacks(models: Iterable[TensorSource]) -> None:
    """Raise `ConfigError` for a stack with a layer that was of another kind in its own model than where it stands in the output, which has the
    first model's config: sliding and full attention, attention and state space, dense and mixture. An architecture that transformers does not
    know is not checked."""
    models = list(models)
    base = models[0]
    if not isinstance(base, StackedSource):
        return
    try:
        output = _kinds(base, sum(len(part) for part in base.parts), base.config)
        for stack in (own for own in models if isinstance(own, StackedSource)):
            _check(stack, output)
    except UnknownArchitectureError as error:
        logger.info("%s", error)


def _check(stack: StackedSource, output: dict[str, list[dict[str, Any]]]) -> None:
    offset = 0
    for part in stack.parts:
        own = _kinds(part.source, LayerStack(part.source).count, part.source.config) if len(part) else {}
        for name in own.keys() & output.keys():
            for i in range(len(part)):
                ours, theirs = output[name][offset + i], own[name][part.start + i]
                differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
                if differing:
                    key = differing[0]
                    raise ConfigError(
                        f"slices: layer {offset + i} of the stack is layer {part.start + i} of {part.source.label}, where it is of another kind:"
                        f" {key} is {shown(theirs.get(key))} there, {shown(ours.get(key))} by the config of the stack. Choose ranges that"
                        " keep every layer at a place of its kind (shift by whole periods of its pattern), or say `unchecked_configs: true`."
                    )
        offset += len(part)


def _kinds(source: TensorSource, count: int, config: dict[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    """Of each list of `count` modules in the architecture: what each of its layers is made of. Raises `CheckpointError`."""
    root = root_checkpoint(source)
    if root is None or config is None or not root.path.is_dir():
        return {}
    overrides = {key: value for key, value in config.items() if value != (root.config or {}).get(key)}
    held = Held.of({n: source.spec(n).shape for n in (*source.names(), *source.aliases)})
    model = meta_model(root.path, held, overrides)
    return {
        name: [dict(_made_of(layer)) for layer in module]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }


def _made_of(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Classes, shapes and plain settings of a layer and its parts."""
    for name, module in layer.named_modules():
        yield f"{name or 'layer'}", type(module).__name__
        for key, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str)) or value is None
            if plain and not key.startswith("_") and not _OWN.search(key):
                yield f"{name}.{key}".lstrip("."), value
    for name, parameter in layer.named_parameters():
        yield name, tuple(parameter.shape)

"""Which tensors of a model are buffers: they are copied from the base and not merged, whatever they hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bmm_engine.checkpoint import TensorSource
from bmm_engine.models.buffers import is_running, looks_constant
from bmm_engine.models.naming import Naming


def constant_buffers(source: TensorSource, names: Iterable[str], naming: Naming | None) -> set[str]:
    """Those of `names` that the architecture makes itself, the same for every model (masks, positions, frequencies), or that hold what no weight
    does (-inf in a mask). Where the architecture is not known, names and shapes tell."""
    names = tuple(names)
    live = {} if naming is None else naming.known(names)
    found = set()
    for name in names:
        own = live.get(name)
        if naming is None or own is None:
            constant = looks_constant(name, source.spec(name).shape)
        elif own not in naming.buffers or is_running(name):
            constant = False
        else:
            constant = (
                own not in naming.stored
                or looks_constant(name, source.spec(name).shape)
                or _holds_infinity(source, name)
            )
        if constant:
            found.add(name)
    return found


def all_buffers(source: TensorSource, names: Iterable[str], naming: Naming | None) -> set[str]:
    """Those of `names` that models may have or lack. Running statistics count as weights."""
    names = tuple(names)
    live = {} if naming is None else naming.known(names)
    return {
        name
        for name in names
        if not is_running(name)
        and (
            live[name] in naming.buffers
            if naming is not None and name in live
            else looks_constant(name, source.spec(name).shape)
        )
    }


def _holds_infinity(source: TensorSource, name: str) -> bool:
    return source.spec(name).dtype.is_floating_point and bool(torch.isinf(source.load(name)).any())

"""A model read in another layout than its files': tensors that one version of transformers fuses and another splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import torch

from bmm_engine.checkpoint.source import TensorSource, TensorSpec, row_span
from bmm_engine.models.conversion import Conversion


class ConvertedSource(TensorSource):
    """`source` with what the `conversions` make of some of its tensors; `own`: what a conversion calls a tensor -> the source's name.

    The outputs of the conversion that was asked last are held, since they are asked for one after another.
    """

    def __init__(self, source: TensorSource, conversions: Sequence[Conversion], own: Mapping[str, str]):
        self.source = source
        self.label = source.label
        self._own = dict(own)
        self._by_output = {name: conversion for conversion in conversions for name in conversion.outputs}
        self._consumed = {self._own[name] for conversion in conversions for name in conversion.inputs}
        self._lock = Lock()
        self._last: tuple[Conversion, dict[str, torch.Tensor]] | None = None

    @property
    def inputs(self) -> tuple[TensorSource, ...]:
        return (self.source,)

    def names(self) -> tuple[str, ...]:
        return (*(name for name in self.source.names() if name not in self._consumed), *self._by_output)

    def __contains__(self, name: object) -> bool:
        return name in self._by_output or (name in self.source and name not in self._consumed)

    def spec(self, name: str) -> TensorSpec:
        if name not in self._by_output:
            return self.source.spec(name)
        conversion = self._by_output[name]
        shape, dtype = conversion.outputs[name]
        return TensorSpec(name, shape, dtype, self.source.spec(self._own[conversion.inputs[0]]).file)

    def load(self, name: str, rows: slice | None = None) -> torch.Tensor:
        if name not in self._by_output:
            return self.source.load(name, rows)
        conversion = self._by_output[name]
        with self._lock:
            if self._last is None or self._last[0] is not conversion:
                self._last = None  # one at a time
                tensors = {one: self.source.load(self._own[one]) for one in conversion.inputs}
                self._last = conversion, conversion.run(tensors)
            tensor = self._last[1][name]
            if rows is not None:
                start, stop = row_span(name, tuple(tensor.shape), rows)
                tensor = tensor[start:stop]
            return tensor.clone(memory_format=torch.contiguous_format)

    @property
    def config(self) -> dict[str, Any] | None:
        return self.source.config

    @property
    def aliases(self) -> dict[str, str]:
        return self.source.aliases

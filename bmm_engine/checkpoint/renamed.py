"""A model read by other names than its files have: those that transformers loads, where a trainer wrapped it before it was saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bmm_engine.checkpoint.source import TensorSource, TensorSpec


class RenamedSource(TensorSource):
    """`source` with other names for some tensors: `renamed`, its name -> the one to read it by."""

    def __init__(self, source: TensorSource, renamed: Mapping[str, str]):
        self.source = source
        self.label = source.label
        self.renamed = dict(renamed)
        self.originals = {new: old for old, new in self.renamed.items()}  # all others are read by their own names

    @property
    def inputs(self) -> tuple[TensorSource, ...]:
        return (self.source,)

    def names(self) -> tuple[str, ...]:
        return tuple(self.renamed.get(name, name) for name in self.source.names())

    def __contains__(self, name: object) -> bool:
        return name in self.originals or (name in self.source and name not in self.renamed)

    def spec(self, name: str) -> TensorSpec:
        return replace(self.source.spec(self.originals.get(name, name)), name=name)

    def load(self, name: str, rows: slice | None = None) -> torch.Tensor:
        return self.source.load(self.originals.get(name, name), rows)

    @property
    def config(self) -> dict[str, Any] | None:
        return self.source.config

    @property
    def aliases(self) -> dict[str, str]:
        return {self.renamed.get(t, t): self.renamed.get(h, h) for t, h in self.source.aliases.items()}

"""A model whose tied tensors become tensors of their own: where one of the models merged has a head that is not its embeddings."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from bmm_engine.checkpoint.source import TensorSource, TensorSpec

_KEY = "tie_word_embeddings"


class UntiedSource(TensorSource):
    """`source` with the tied names `own` as tensors of their own, each with the values that it is tied to. `config`: what says so."""

    def __init__(self, source: TensorSource, own: Iterable[str], config: dict[str, Any] | None):
        self.source = source
        self.label = source.label
        self.own = tuple(own)
        self._config = config

    @property
    def inputs(self) -> tuple[TensorSource, ...]:
        return (self.source,)

    def names(self) -> tuple[str, ...]:
        return (*self.source.names(), *self.own)

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def spec(self, name: str) -> TensorSpec:
        return replace(self.source.spec(name), name=name)

    def load(self, name: str, rows: slice | None = None) -> torch.Tensor:
        return self.source.load(name, rows)

    @property
    def config(self) -> dict[str, Any] | None:
        return self._config

    @property
    def aliases(self) -> dict[str, str]:
        return {tied: holder for tied, holder in self.source.aliases.items() if tied not in self.own}


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with `tie_word_embeddings` false, in its sections too."""
    config = copy.deepcopy(config)
    config[_KEY] = False
    for section in config.values():
        if isinstance(section, dict) and section.get(_KEY) is True:
            section[_KEY] = False
    return config

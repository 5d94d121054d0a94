"""A base in the place of one expert, the host: by the host's names, with the host's config and files, and with all that only the host has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from bmm_engine.checkpoint.adapter import AdapterSource
from bmm_engine.checkpoint.source import TensorSource, TensorSpec


class HostedSource(TensorSource):
    """`base` as its fine-tune `host` would hold it: `names_of_base`, the host's name -> the base's, of the tensors that come from the base; all
    others are the host's own."""

    def __init__(self, base: TensorSource, host: TensorSource, names_of_base: Mapping[str, str]):
        self.base, self.host = base, host
        self.label = base.label
        self.names_of_base = dict(names_of_base)

    @property
    def inputs(self) -> tuple[TensorSource, ...]:
        """The host first: its files stand beside the output."""
        return (self.host, self.base)

    def names(self) -> tuple[str, ...]:
        return self.host.names()

    def __contains__(self, name: object) -> bool:
        return name in self.host

    def spec(self, name: str) -> TensorSpec:
        """The host's; of what an adapter changes, whose dtype is that of its arithmetic, the base's."""
        spec = self.host.spec(name)
        if isinstance(self.host, AdapterSource) and name in self.names_of_base:
            return replace(spec, dtype=self.base.spec(self.names_of_base[name]).dtype)
        return spec

    def load(self, name: str, rows: slice | None = None) -> torch.Tensor:
        name = self.host.aliases.get(name, name)
        if name in self.names_of_base:
            return self.base.load(self.names_of_base[name], rows)
        return self.host.load(name, rows)

    @property
    def config(self) -> dict[str, Any] | None:
        return self.host.config

    @property
    def aliases(self) -> dict[str, str]:
        return self.host.aliases

    @property
    def own(self) -> tuple[str, ...]:
        """What comes from the host."""
        return tuple(name for name in self.host.names() if name not in self.names_of_base)

    def keep_own(self, names: Iterable[str]) -> None:
        """Have these come from the host too."""
        for name in names:
            self.names_of_base.pop(name, None)

"""How a sequential merge walks through the network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bmm_engine.checkpoint import parse_size
from bmm_engine.errors import ConfigError
from bmm_engine.merging.output import parse_dtype
from bmm_engine.models.calling import Mask, placement
from bmm_engine.sequential.solve import check_mean_weight


@dataclass(frozen=True)
class SequentialOptions:
    """Every field as in `merge_sequential`. Raises `ConfigError`."""

    fit_bias: bool = True
    target: str = "stream"
    mean_weight: float = 0.0
    task_vector_samples: float = 100.0
    norms: str = "anchor"
    sweeps: int = 1
    blocks: str | None = None
    mask: Mask = "attention_mask"
    walk_dtype: torch.dtype | str | None = None
    hidden_memory: int | str = "4GB"
    hidden_dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise ConfigError(f"sweeps must be a whole number >= 1, not {self.sweeps!r}.")
        if self.target not in ("stream", "module"):
            raise ConfigError(f"target must be 'stream' or 'module', not {self.target!r}.")
        check_mean_weight(self.mean_weight)
        own = self.task_vector_samples
        if isinstance(own, bool) or not isinstance(own, (int, float)) or not (math.isfinite(own) and own >= 0):
            raise ConfigError(f"task_vector_samples must be a number >= 0, not {own!r}.")
        if self.norms not in ("anchor", "fit"):
            raise ConfigError(f"norms must be 'anchor' or 'fit', not {self.norms!r}.")
        _ = self.hidden_bytes, parse_dtype(self.walk_dtype), parse_dtype(self.hidden_dtype)

    def hybrid_share(self, samples: int) -> float:
        """Of the task vector's Gram, beside the measured one of so many samples."""
        return self.task_vector_samples / (self.task_vector_samples + samples)

    @property
    def hidden_bytes(self) -> int:
        """Of memory for hidden states."""
        return parse_size(self.hidden_memory) if self.hidden_memory else 0

    def run_dtype(self, base: Any) -> torch.dtype:
        """What the models run in."""
        own = placement(base)[1] if isinstance(base, nn.Module) else torch.float32
        return parse_dtype(self.walk_dtype) or own

"""One model on its way through one task's calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.models.blocks import BlockWalk, Weighted
from bmm_engine.models.calling import BodyEnd, Mask, call_model, to_device
from bmm_engine.sequential.hidden import HiddenStates
from bmm_engine.sequential.reading import Run
from bmm_engine.sequential.replay import Replay
from bmm_engine.sequential.skeleton import Load, Skeleton


class Passage:
    """An expert, or the merged network, on its way. `keep`: makes the place where the hidden states of a chain are kept, from its number."""

    def __init__(self, batches: Sequence[Any], read: Load, keep: Callable[[int], HiddenStates]):
        self.batches, self.read, self._keep = batches, read, keep
        self.walks: list[BlockWalk] = []
        self._hidden: list[HiddenStates] = []
        # Of the block at work, or the whole model: its tensors by their names in it, what need not be computed again, and which parts are finished.
        self.tensors: dict[str, Tensor] = {}
        self.replay: Replay | None = None
        self.finished: Sequence[str] = ()

    def begin(self, skeleton: Skeleton, chain: str, mask: Mask, *, resumed: HiddenStates | None = None) -> None:
        """What the blocks of a chain are called with, and the hidden states before the first (unless an earlier walk left later ones)."""
        tensors = {**skeleton.outside(self.read), **skeleton.inside((chain, 0), self.read)}
        self._hidden.append(resumed or self._keep(len(self.walks)))
        walk = BlockWalk(
            Weighted(skeleton.model, tensors),
            chain,
            self.batches,
            mask,
            device=skeleton.device,
            hidden=self._hidden[-1],
            after=self.walks,
        )
        self.walks.append(walk)

    @property
    def hidden(self) -> HiddenStates | None:
        """Those of the chain at work; None before the first."""
        return self._hidden[-1] if self._hidden else None

    def end(self) -> None:
        """The chain is at its end: its last hidden states stay in memory, since what follows reads them."""
        self.walking().hidden = list(self.walking().hidden)

    def through(self, index: int, block: nn.Module) -> Run:
        """Runs batches through the block at work."""
        return self._replaying(block, lambda batch, own: self.walking().call(batch, index, own))

    def whole(self, model: nn.Module, device: torch.device) -> Run:
        """Runs batches through the whole model, which is at work."""

        def call(batch: int, own: Weighted) -> Any:
            with torch.inference_mode(), suppress(BodyEnd):
                return call_model(own, to_device(self.batches[batch], device))

        return self._replaying(model, call)

    def _replaying(self, block: nn.Module, call: Callable[[int, Weighted], Any]) -> Run:
        tied = len(list(block.parameters())) < len(list(block.named_parameters(remove_duplicate=False)))

        def run(batch: int) -> Any:
            assert self.replay is not None
            with self.replay.passing(batch, self.finished):
                return call(batch, Weighted(block, self.tensors, tied))

        return run

    def walking(self) -> BlockWalk:
        assert self.walks, "the walk through the blocks has not begun"
        return self.walks[-1]

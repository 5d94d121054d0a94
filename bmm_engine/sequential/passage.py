"""One model on its way through one task's calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bmm_engine.models.blocks import BlockWalk, Weighted
from bmm_engine.sequential.hidden import HiddenStates
from bmm_engine.sequential.reading import Run
from bmm_engine.sequential.replay import Replay
from bmm_engine.sequential.skeleton import Load


class Passage:
    """An expert, or the merged network, on its way."""

    def __init__(self, batches: Sequence[Any], read: Load, hidden: HiddenStates):
        self.batches, self.read, self.hidden = batches, read, hidden
        self.walk: BlockWalk | None = None
        # Of the block at work: its tensors by their names in it, what need not be computed again, and which of its parts are finished.
        self.tensors: dict[str, Tensor] = {}
        self.replay: Replay | None = None
        self.finished: Sequence[str] = ()

    def through(self, index: int, block: nn.Module) -> Run:
        """Runs batches through the block at work."""
        tied = len(list(block.parameters())) < len(list(block.named_parameters(remove_duplicate=False)))

        def run(batch: int) -> Any:
            assert self.replay is not None
            with self.replay.passing(batch, self.finished):
                return self.walking().call(batch, index, Weighted(block, self.tensors, tied))

        return run

    def walking(self) -> BlockWalk:
        assert self.walk is not None, "the walk through the blocks has not begun"
        return self.walk

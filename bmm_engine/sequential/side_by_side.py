"""Each expert and the merged network read the same calibration data, side by side, and what they read is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bmm_engine.models.calling import Padding, samples_of
from bmm_engine.sequential.modules import Waiting
from bmm_engine.sequential.passage import Passage
from bmm_engine.sequential.reading import OtherRowsError, Read, Reader, Run
from bmm_engine.sequential.reads import ExpertReads
from bmm_engine.sequential.skeleton import Skeleton
from bmm_engine.sequential.tokens import TokenRows


@dataclass(frozen=True)
class SideBySide:
    """`experts[t]` and `merged[t]`: expert t, and the merged network, on expert t's batches, whose padding is `padding[t]`. `reads`: keeps what the
    experts read, or has it from an earlier walk: then they are not run."""

    skeleton: Skeleton
    experts: Sequence[Passage]
    merged: Sequence[Passage]
    padding: Sequence[Sequence[Padding | None]]
    reads: ExpertReads | None

    @property
    def known(self) -> bool:
        """Is what the experts read known, so that they need not be run?"""
        return self.reads is not None and self.reads.complete

    @property
    def running(self) -> list[Passage]:
        return [*([] if self.known else self.experts), *self.merged]

    def measure(
        self,
        reader: Reader,
        accumulators: Sequence[Any],
        run_of: Callable[[Passage], Run],
        *,
        through: bool = False,
        tokens: TokenRows | None = None,
    ) -> None:
        """Add what both read at an input to each expert's accumulator, or None where there is nothing to solve. With `through` the experts' hidden
        states go on. `tokens`: which rows count more, unless a router chooses them. Raises `OtherRowsError` where they read unlike numbers of rows,
        unless those are known to be routed."""
        for t, accumulator in enumerate(accumulators):
            own_run = None if self.known else run_of(self.experts[t])
            if accumulator is None:
                for b in range(len(self.experts[t].batches) if own_run is not None else 0):
                    self._own(reader, t, b, own_run, through)
                continue
            merged_run = run_of(self.merged[t])
            waiting = Waiting(
                accumulator,
                self.skeleton.dtype,
                self.skeleton.device,
                outputs=reader.outputs,
                tokens=None if reader.routed else tokens,
            )
            for b, padding in enumerate(self.padding[t]):
                own = self._own(reader, t, b, own_run, through)
                drifted = own if reader.routed else reader.read(merged_run, b)
                if [read.x.shape for read in own] != [read.x.shape for read in drifted]:
                    rows = [sum(read.x.numel() // read.x.shape[-1] for read in reads) for reads in (own, drifted)]
                    raise OtherRowsError(
                        f"{reader.shared.leader}: reads {rows[0]} rows of batch {b} in expert {t}, {rows[1]} in the merged network"
                    )
                for pair in zip(own, drifted, strict=True):
                    waiting.add(*pair, padding, samples_of(self.experts[t].batches[b]))
            waiting.flush()

    def _own(self, reader: Reader, t: int, batch: int, run: Run | None, through: bool) -> list[Read]:
        """What expert `t` reads of a batch."""
        leader, expert = reader.shared.leader, self.experts[t]
        if run is None:
            assert self.reads is not None
            return self.reads.get(leader, t, batch, self.skeleton.device)
        if through:
            own, output = reader.read_through(run, batch)
            expert.walking().advance(batch, output)
        else:
            own = reader.read(run, batch)
        if self.reads is not None:
            self.reads.put(leader, t, batch, own)
        return own

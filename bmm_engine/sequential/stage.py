"""One stage of the network: what its modules read there is measured, and they are solved, input by input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bmm_engine.errors import CollectionError
from bmm_engine.merging.stream import InputRecord
from bmm_engine.models.architecture import LinearModule
from bmm_engine.models.roles import gives_keys
from bmm_engine.sequential.modules import ModuleSolver, Part, Solved, Written
from bmm_engine.sequential.norms import Norm, NormSolver
from bmm_engine.sequential.passage import Passage
from bmm_engine.sequential.reading import OtherRowsError, Reader, Run, SharedInput, shared_inputs
from bmm_engine.sequential.replay import finished_parts
from bmm_engine.sequential.side_by_side import SideBySide
from bmm_engine.sequential.skeleton import Skeleton
from bmm_engine.sequential.tokens import TokenRows, apart


class StageSolver:
    """Solves the `modules` and `norms` (by live name) that the stages of a network call. `left`: those that no stage has called yet; `now`: what the
    stage at work has solved; `routed`: module -> what is said of one whose rows a router chooses.

    `solver` and `norm_solver` know the anchor: `against` makes them.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        both: SideBySide,
        modules: Mapping[str, LinearModule],
        norms: Mapping[str, Norm],
        target: str,
    ):
        self.skeleton, self.model, self.both, self.target = skeleton, skeleton.model, both, target
        self.modules, self.norms = modules, norms
        self.left = {*modules, *norms}
        self.now = Solved()
        self.routed: dict[str, str] = {}

    def against(self, solver: ModuleSolver, norm_solver: NormSolver) -> None:
        self.solver, self.norm_solver = solver, norm_solver

    def solve(
        self,
        label: str,
        names: Iterable[str],
        run_of: Callable[[Passage], Run],
        earlier: Sequence[InputRecord],
        block: nn.Module | None = None,
        merged: dict[str, Tensor] | None = None,
        *,
        advance: bool = False,
        prefix: str | None = None,
        tokens: TokenRows | None = None,
    ) -> bool:
        """Solve the modules called `names` (live), in the order in which they read; those that the stage does not call are left. `earlier`: the
        records of the stages before.

        `block`: the block that it is, if it is one, with its `prefix` in live names, and `merged`: the merged network's tensors of it, kept up to
        date. With `advance`, the experts' hidden states go on with the last pass. Returns whether they did. `tokens`: which rows count more, but for
        keys, values and normalisations.
        """
        names, prefix = set(names), f"{label}." if prefix is None else prefix
        listened = {name: m for name, m in self.model.named_modules() if name in names}
        found, through = shared_inputs(listened, self.norms, run_of(self.both.merged[0])), False
        if tokens is not None:
            found = apart(found)
        for shared in found:
            # What reads a part of the rows may be given them by a router, and have to be read again.
            through = advance and shared is found[-1] and shared.rows == self._rows_of_first_batch()
            if block is not None:
                self._finish_parts(prefix, block, found, shared, through)
            norm = self.norms.get(shared.leader)
            parts = [] if norm else self.solver.parts([self.modules[name] for name in shared.modules])
            outputs = 0  # that are added to the residual stream
            if self.target == "stream" and shared.additions:
                outputs = self.modules[shared.leader].out_features
            measured = self._accumulators(parts, norm, stream=bool(outputs))
            with Reader(shared, listened[shared.leader], outputs).listening() as reader:
                try:
                    weighed = None if norm is not None or gives_keys(shared.leader) else tokens
                    self.both.measure(reader, measured, run_of, through=through, tokens=weighed)
                except OtherRowsError as error:
                    if through:  # some hidden states have gone on
                        raise CollectionError(
                            f"{error}: a router chooses its rows; leave it out with `modules`."
                        ) from error
                    self.routed[shared.leader] = (
                        f"{error}: a router chooses its rows; it is solved on those that each expert itself gives it"
                    )
                    reader.routed, reader.outputs, outputs, measured = True, 0, 0, self._accumulators(parts, norm)
                    self.both.measure(reader, measured, run_of)
                    if any(own is not None and not own.rows for own in measured):
                        self.routed[shared.leader] = (
                            f"{shared.leader}: an expert's router gives it no rows; it stays as the anchor has it"
                        )
                        self.left -= set(shared.modules)
                        continue
            before = set(self.now.tensors)
            if norm is not None:
                self.norm_solver.solve(label, norm, measured, self.now)
            elif parts:
                written = Written.by((*earlier, *self.now.inputs), len(self.both.experts)) if outputs else None
                self.solver.solve(label, parts, measured, self.now, written=written)
            self.left -= set(shared.modules)
            if merged is not None:
                for name in set(self.now.tensors) - before:
                    live = self.skeleton.names[name].removeprefix(prefix)
                    merged[live] = self.skeleton.ready(self.now.tensors[name])
        return bool(found) and through

    def _rows_of_first_batch(self) -> int:
        """Rows of the hidden states of the first expert's first batch."""
        hidden: Tensor = self.both.merged[0].walking().hidden[0]
        return hidden.shape[:-1].numel()

    def _accumulators(self, parts: list[Part], norm: Norm | None, *, stream: bool = False) -> list[Any]:
        """One for each expert; None where there is nothing to solve."""
        tasks, dtype = range(len(self.both.experts)), self.skeleton.dtype
        if norm is not None:
            return [self.norm_solver.accumulator(norm, t, dtype) for t in tasks]
        return [self.solver.accumulator(parts, t, dtype, stream=stream) if parts else None for t in tasks]

    def _finish_parts(
        self, prefix: str, block: nn.Module, found: Sequence[SharedInput], now: SharedInput, through: bool
    ) -> None:
        """What of the block will not change any more, now that the inputs before `now` are solved."""
        at = found.index(now)
        solved, unsolved = (
            [name.removeprefix(prefix) for shared in part for name in shared.modules]
            for part in (found[:at], found[at:])
        )
        # What is called several times may read, at a later call, what is not solved yet.
        again = [name.removeprefix(prefix) for shared in found if shared.calls > 1 for name in shared.modules]
        parts = finished_parts(block, solved, [*unsolved, *again])
        for passage in self.both.merged:
            passage.finished = parts
        for passage in self.both.experts:
            passage.finished = () if through else parts  # the last pass is not followed by another

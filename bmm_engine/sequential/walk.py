"""From input to output: at each input of the network's modules, measure how far it drifts, and solve the modules that read it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.checkpoint import TensorSource
from bmm_engine.checkpoint.rows_by_text import renumbered
from bmm_engine.errors import CollectionError, EmptyCalibrationError
from bmm_engine.memory import release_free_memory
from bmm_engine.merging.inputs import Inputs
from bmm_engine.merging.plan import MergePlan
from bmm_engine.merging.stream import InputRecord, ModuleRecord
from bmm_engine.models.architecture import LinearModule, is_head
from bmm_engine.models.blocks import BlockWalk, Weighted, before_blocks, without_cache
from bmm_engine.models.calling import evaluating, mask_of, samples_of, to_device
from bmm_engine.progress import Report, track
from bmm_engine.sequential.hidden import HiddenStates, Room
from bmm_engine.sequential.modules import ModuleSolver, Solved, Waiting, Written
from bmm_engine.sequential.moments import Accumulator
from bmm_engine.sequential.norms import Norm, NormAccumulator, NormSolver, is_norm
from bmm_engine.sequential.passage import Passage
from bmm_engine.sequential.reading import Read, Reader, Run, SharedInput, shared_inputs
from bmm_engine.sequential.reads import ExpertReads
from bmm_engine.sequential.replay import Replay, finished_parts
from bmm_engine.sequential.skeleton import Skeleton, reader_of
from bmm_engine.sequential.state import Sweep


class SequentialWalk:
    """One sweep over the network. `run` it; then `sweep` holds the solved tensors, and `inputs`, `modules` say what was done."""

    def __init__(
        self,
        plan: MergePlan,
        skeleton: Skeleton,
        batches: Sequence[Sequence[Any]],
        sweep: Sweep,
        report: Report = lambda line: None,
        reads: ExpertReads | None = None,
    ):
        """`plan`: of modules one by one (its settings' `gram_source` is "task_vectors"); `batches` by expert, as the plan lists them. `reads`:
        keeps what the experts read, or has it from an earlier walk over the same experts and batches: then they are not run.

        Raises `EmptyCalibrationError`, `CollectionError`.
        """
        for t, own in enumerate(batches):
            if not own:
                raise EmptyCalibrationError(f"expert {t}: its calibration set is empty: no batches.")
        # Where rows were matched by their tokens, experts are read by the output's numbers.
        batches = [renumbered(e.source, own) for e, own in zip(plan.alignment.experts, batches, strict=True)]
        options = plan.settings.sequential
        self.skeleton, self.sweep, self.options, self.report = skeleton, sweep, options, report
        self.plan, self.model, self.reads = plan, skeleton.model, reads
        self.expert_inputs = Inputs(plan)
        self._modules: dict[str, LinearModule] = {}  # by live name
        for module in (m for group in plan.groups for m in group.members):
            live = skeleton.live_module(module.name)
            if live is None:
                raise CollectionError(
                    f"{module.name}: is no module of the live {type(self.model).__name__}; leave it out with `modules`."
                )
            self._modules[live] = module
        self._room, dtype = Room(options.hidden_bytes), options.hidden_dtype or skeleton.dtype
        kept = partial(HiddenStates, room=self._room, dtype=dtype, run_dtype=skeleton.dtype, keep=sweep.resumable)
        ordered = self.expert_inputs.ordered(batches)
        readers = [reader_of(plan.alignment, expert) for expert in self.expert_inputs.experts]
        self.experts, self.merged = (
            [
                Passage(own, read, kept(f"{whose}-{t}"))
                for t, (own, read) in enumerate(zip(ordered, reading, strict=True))
            ]
            for whose, reading in (("expert", readers), ("merged", [self._read_merged] * len(readers)))
        )
        self._masks = [[mask_of(to_device(b, skeleton.device), options.mask) for b in own] for own in ordered]
        self._norms = self._find_norms(plan) if options.norms == "fit" else {}
        self._now = Solved()
        self._left = {*self._modules, *self._norms}

    def _find_norms(self, plan: MergePlan) -> dict[str, Norm]:
        """Normalisations whose tensors are merged, by live name."""
        merged = {live: name for name, live in self.skeleton.names.items() if name in set(plan.alignment.merged)}
        found = {}
        for live, module in self.model.named_modules():
            if is_norm(module) and f"{live}.weight" in merged and not is_head(live, self.model):
                has_bias = getattr(module, "bias", None) is not None
                if not has_bias or f"{live}.bias" in merged:
                    found[live] = Norm(
                        live, copy.deepcopy(module), merged[f"{live}.weight"], merged.get(f"{live}.bias")
                    )
        return found

    @property
    def inputs(self) -> list[InputRecord]:
        """What was done at each input, in order."""
        return [_as_record(InputRecord, raw) for stage in self.sweep.records for raw in stage["inputs"]]

    @property
    def modules(self) -> list[ModuleRecord]:
        return [_as_record(ModuleRecord, raw) for stage in self.sweep.records for raw in stage["modules"]]

    def run(self, anchor: TensorSource, progress: bool | None = None) -> None:
        """Solve everything against the tensors of `anchor` (float32 or wider, by the base's names).

        Raises `CollectionError`, `EmptyCalibrationError`, `NonFiniteGramError`, what a solve raises, `OutputWriteError`."""
        self.anchor = anchor
        samples = [sum(map(samples_of, passage.batches)) for passage in self.experts]
        self.solver = ModuleSolver(self.plan, self.expert_inputs, anchor, samples)
        self.norms = NormSolver(self.plan, self.expert_inputs, anchor)
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(without_cache(self.model))
            stack.enter_context(torch.no_grad())
            self._resume()
            for number in track(range(self.skeleton.count + 2), "merging block by block", show=progress):
                if number > self.sweep.finished and self._left:
                    self._carry_out(number)
                    release_free_memory()
        if self.reads is not None:
            self.reads.complete = True
        if never := self._left & set(self._modules):
            raise self._never_called(never)
        if self.options.target == "stream" and not any(record.stream for record in self.inputs):
            self.report(
                "none of the merged modules writes straight to a residual stream: all are aimed at what the expert's modules give"
            )
        if self._left:
            self.report(
                f"{len(self._left)} normalisations are never called, the first is {min(self._left)}; they stay as the anchor has them"
            )

    def _resume(self) -> None:
        for record in self.sweep.records:
            done = {name for raw in record["inputs"] for name in raw["modules"]}
            self._left -= {live for live, module in self._modules.items() if module.name in done}
            self._left -= {live for live, norm in self._norms.items() if norm.weight.removesuffix(".weight") in done}
        found = self.sweep.hidden_index()
        if found is None or not self._left:
            return
        folder, index = found
        for passage in (*self.experts, *self.merged):
            passage.hidden.resume(folder, index[passage.hidden.name])
        self.report(f"going on after {self.sweep.records[-1]['stage']}")
        self._begin_walks()

    def _carry_out(self, number: int) -> None:
        self._now = Solved()
        passages = self._running
        with self.sweep.stage(number) as folder:
            for passage in passages:
                passage.hidden.into(folder)
            if number == 0:
                label = self._before_blocks()
            elif number <= self.skeleton.count:
                label = self._block(number - 1)
            else:
                label = self._after_blocks()
            for passage in passages:
                passage.hidden.turn()
            record = {
                "stage": label,
                "inputs": [asdict(r) for r in self._now.inputs],
                "modules": [asdict(r) for r in self._now.modules],
                "hidden": {p.hidden.name: p.hidden.layout() for p in passages} if self._left else {},
            }
            path = self.sweep.publish(number, self._now.tensors, record)
        if path is not None:
            for passage in passages:
                passage.hidden.moved(path)
        for own in self._now.inputs:
            self.report(_line(own))

    # The stages

    def _before_blocks(self) -> str:
        label, device = "before the blocks", self.skeleton.device
        outside = [live for live in self._left if self.skeleton.place(live) is None]

        def run_of(passage: Passage) -> Run:
            model = Weighted(self.model, self.skeleton.outside(passage.read))
            return lambda b: before_blocks(model, self.skeleton.blocks, to_device(passage.batches[b], device))

        if outside:
            self._solve_stage(label, outside, run_of)
        if self._left:
            self._begin_walks()
        return label

    def _begin_walks(self) -> None:
        """What the blocks are called with, and the hidden states before the first (unless an earlier walk left later ones)."""
        skeleton, options = self.skeleton, self.options
        first = skeleton.tensor_names(0)
        for passage in self._running:
            tensors = {**skeleton.outside(passage.read), **skeleton.load(first, passage.read)}
            passage.walk = BlockWalk(
                Weighted(self.model, tensors),
                skeleton.blocks,
                passage.batches,
                options.mask,
                device=skeleton.device,
                hidden=passage.hidden,
            )

    def _block(self, index: int) -> str:
        skeleton, label = self.skeleton, f"{self.skeleton.blocks}.{index}"
        inside = [live for live in self._left if skeleton.place(live) == index]
        block, names = skeleton.block(index), skeleton.tensor_names(index)

        passages = self._running
        shared = skeleton.within(index, skeleton.load(names, self._read_merged))
        for passage in passages:
            # On a GPU it is faster to compute again than to keep on the CPU.
            room = self._room if skeleton.device.type == "cpu" else Room(0)
            passage.replay = Replay(block, room, len(passage.batches))
            own = passage in self.experts
            passage.tensors = skeleton.within(index, skeleton.load(names, passage.read)) if own else shared
        goes_on = set(inside) != self._left
        advanced = False
        if inside:
            advanced = self._solve_stage(
                label, inside, lambda passage: passage.through(index, block), block, shared, advance=goes_on
            )
        if never := self._left & set(inside) & set(self._modules):
            raise self._never_called(never)
        for passage in passages:
            if goes_on and not (advanced and passage in self.experts):
                passage.finished = ()
                run = passage.through(index, block)
                for batch in range(len(passage.batches)):
                    passage.walking().advance(batch, run(batch))
        for passage in passages:
            passage.tensors, passage.finished = {}, ()
            if passage.replay is not None:
                passage.replay.clear()
                passage.replay = None
        return label

    def _after_blocks(self) -> str:
        label = "after the blocks"

        def run_of(passage: Passage) -> Run:
            model = Weighted(self.model, self.skeleton.outside(passage.read))
            return lambda b: passage.walking().finish(b, model)

        self._solve_stage(label, sorted(self._left), run_of)
        return label

    # One stage

    def _solve_stage(
        self,
        label: str,
        names: Iterable[str],
        run_of: Callable[[Passage], Run],
        block: nn.Module | None = None,
        merged: dict[str, Tensor] | None = None,
        *,
        advance: bool = False,
    ) -> bool:
        """Solve the modules called `names` (live), in the order in which they read; those that the stage does not call are left.

        `block`: the block that it is, if it is one, and `merged`: the merged network's tensors of it, kept up to date. With `advance`, the
        experts' hidden states go on with the last pass. Returns whether they did.
        """
        names = set(names)
        listened = {name: m for name, m in self.model.named_modules() if name in names}
        found = shared_inputs(listened, self._norms, run_of(self.merged[0]))
        for shared in found:
            through = advance and shared is found[-1]
            if block is not None:
                self._finish_parts(label, block, found, shared, through)
            tasks, dtype = range(len(self.experts)), self.skeleton.dtype
            norm = self._norms.get(shared.leader)
            parts = [] if norm else self.solver.parts([self._modules[name] for name in shared.modules])
            outputs = 0  # that are added to the residual stream
            if self.options.target == "stream" and shared.additions:
                outputs = self._modules[shared.leader].out_features
            measured: list[Any]
            if norm is not None:
                measured = [self.norms.accumulator(norm, t, dtype) for t in tasks]
            else:
                measured = [
                    self.solver.accumulator(parts, t, dtype, stream=bool(outputs)) if parts else None for t in tasks
                ]
            with Reader(shared, listened[shared.leader], outputs).listening() as reader:
                for t, accumulator in enumerate(measured):
                    self._measure(reader, accumulator, t, run_of, through)
            before = set(self._now.tensors)
            if norm is not None:
                self.norms.solve(label, norm, measured, self._now)
            elif parts:
                written = Written.by((*self.inputs, *self._now.inputs), len(self.experts)) if outputs else None
                self.solver.solve(label, parts, measured, self._now, written=written)
            self._left -= set(shared.modules)
            if merged is not None:
                for name in set(self._now.tensors) - before:
                    live = self.skeleton.names[name].removeprefix(f"{label}.")
                    merged[live] = self.skeleton.ready(self._now.tensors[name])
        return bool(found) and advance

    def _finish_parts(
        self, label: str, block: nn.Module, found: Sequence[SharedInput], now: SharedInput, through: bool
    ) -> None:
        """What of the block will not change any more, now that the inputs before `now` are solved."""
        at = found.index(now)
        solved, unsolved = (
            [name.removeprefix(f"{label}.") for shared in part for name in shared.modules]
            for part in (found[:at], found[at:])
        )
        parts = finished_parts(block, solved, unsolved)
        for passage in self.merged:
            passage.finished = parts
        for passage in self.experts:
            passage.finished = () if through else parts  # the last pass is not followed by another

    def _measure(
        self,
        reader: Reader,
        accumulator: Accumulator | NormAccumulator | None,
        t: int,
        run_of: Callable[[Passage], Run],
        through: bool,
    ) -> None:
        """Have expert `t` and the merged network read its batches; `accumulator` is None where there is nothing to solve."""
        expert, merged = self.experts[t], self.merged[t]
        own_run = None if self._known else run_of(expert)
        if accumulator is None:
            for b in range(len(expert.batches) if own_run is not None else 0):
                self._own(reader, t, b, own_run, through)
            return
        merged_run = run_of(merged)
        waiting = Waiting(accumulator, self.skeleton.dtype, self.skeleton.device, outputs=reader.outputs)
        for b, mask in enumerate(self._masks[t]):
            own = self._own(reader, t, b, own_run, through)
            drifted = reader.read(merged_run, b)
            for pair in zip(own, drifted, strict=True):
                waiting.add(*pair, mask)
        waiting.flush()

    def _own(self, reader: Reader, t: int, batch: int, run: Run | None, through: bool) -> list[Read]:
        """What expert `t` reads of a batch; with `through` its hidden states go on."""
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

    @property
    def _known(self) -> bool:
        """Is what the experts read known, so that they need not be run?"""
        return self.reads is not None and self.reads.complete

    @property
    def _running(self) -> list[Passage]:
        return self.merged if self._known else [*self.experts, *self.merged]

    def _read_merged(self, name: str) -> Tensor:
        """The merged network's tensor as far as it is solved, the anchor's elsewhere."""
        if name in self._now.tensors:
            return self._now.tensors[name]
        return self.sweep.load(name) if name in self.sweep else self.anchor.load(name)

    def _never_called(self, names: Iterable[str]) -> CollectionError:
        missing = [module.name for live, module in self._modules.items() if live in set(names)]
        return CollectionError(
            f"{len(missing)} linear modules were never called by the calibration batches where they stand, the first is {missing[0]!r}. Leave them"
            " out with `modules`, or give batches that reach them."
        )


def _as_record(kind: Any, raw: dict[str, Any]) -> Any:
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()})


def _line(record: InputRecord) -> str:
    def mean(values: Sequence[float | None]) -> str:
        known = [v for v in values if v is not None]
        return f"{sum(known) / len(known):.3f}" if known else "-"

    more = f" and {len(record.modules) - 1} more" if len(record.modules) > 1 else ""
    where = " (of the stream after it)" if record.stream else ""
    return f"{record.modules[0]}{more}: relative residual{where} {mean(record.before)} with the anchor, {mean(record.after)} solved"

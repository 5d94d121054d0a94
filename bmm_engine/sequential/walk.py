"""From input to output: at each input of the network's modules, measure how far it drifts, and solve the modules that read it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.checkpoint import TensorSource
from bmm_engine.checkpoint.rows_by_text import renumbered
from bmm_engine.errors import CollectionError, ConfigError, EmptyCalibrationError
from bmm_engine.memory import release_free_memory
from bmm_engine.merging.inputs import Inputs
from bmm_engine.merging.plan import MergePlan
from bmm_engine.merging.stream import InputRecord, ModuleRecord
from bmm_engine.models.architecture import LinearModule, is_head
from bmm_engine.models.blocks import Weighted, before_blocks, block_list, without_cache
from bmm_engine.models.calling import evaluating, padding_of, samples_of, to_device
from bmm_engine.models.heads import without_heads
from bmm_engine.progress import Report, track
from bmm_engine.sequential.hidden import HiddenStates, Room
from bmm_engine.sequential.modules import ModuleSolver, Solved
from bmm_engine.sequential.norms import NormSolver, find_norms
from bmm_engine.sequential.passage import Passage
from bmm_engine.sequential.reading import Run
from bmm_engine.sequential.reads import ExpertReads
from bmm_engine.sequential.replay import Replay
from bmm_engine.sequential.side_by_side import SideBySide
from bmm_engine.sequential.skeleton import Block, Skeleton, label_of, reader_of
from bmm_engine.sequential.stage import StageSolver
from bmm_engine.sequential.state import Sweep
from bmm_engine.sequential.tokens import TokenRows

# What stands before a chain of blocks, by its name; a block; or what comes after the last chain.
Stage = str | Block | None


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
        self.plan, self.model = plan, skeleton.model
        self.expert_inputs = Inputs(plan)
        modules: dict[str, LinearModule] = {}  # by live name
        for module in (m for group in plan.groups for m in group.members):
            live = skeleton.live_module(module.name)
            if live is None:
                raise CollectionError(
                    f"{module.name}: is no module of the live {type(self.model).__name__}; leave it out with `modules`."
                )
            modules[live] = module
        self._room = Room(options.hidden_bytes)
        ordered = self.expert_inputs.ordered(batches)
        readers = [reader_of(plan.alignment, expert) for expert in self.expert_inputs.experts]
        experts, merged = (
            [
                Passage(own, read, partial(self._hidden_states, f"{whose}-{t}"))
                for t, (own, read) in enumerate(zip(ordered, reading, strict=True))
            ]
            for whose, reading in (("expert", readers), ("merged", [self._read_merged] * len(readers)))
        )
        padding = [
            [padding_of(self.model, to_device(b, skeleton.device), options.mask) for b in own] for own in ordered
        ]
        self.both = SideBySide(skeleton, experts, merged, padding, reads)
        norms = find_norms(self.model, skeleton.names, plan) if options.norms == "fit" else {}
        self.stage = StageSolver(skeleton, self.both, modules, norms, options.target)
        self._heads = any(
            is_head(name, self.model) for name in (*self.stage.modules, *self.stage.norms)
        )  # then those are run

    def weigh_by(self, plan: MergePlan) -> None:
        """Take a plan that differs in its sensitivities. Before the walk is run."""
        self.plan, self.expert_inputs = plan, Inputs(plan)

    @property
    def inputs(self) -> list[InputRecord]:
        """What was done at each input, in order."""
        return [_as_record(InputRecord, raw) for stage in self.sweep.records for raw in stage["inputs"]]

    @property
    def modules(self) -> list[ModuleRecord]:
        return [_as_record(ModuleRecord, raw) for stage in self.sweep.records for raw in stage["modules"]]

    def run(self, anchor: TensorSource, progress: bool | None = None, *, first: bool = True) -> None:
        """Solve everything against the tensors of `anchor` (float32 or wider, by the base's names). Only the `first` sweep overshoots it, by the
        settings' `prior`: later ones start from what was solved.

        Raises `CollectionError`, `EmptyCalibrationError`, `NonFiniteGramError`, what a solve raises, `OutputWriteError`."""
        self.anchor = anchor
        samples = [sum(map(samples_of, passage.batches)) for passage in self.both.experts]
        prior = self.plan.settings.prior if first else 1.0
        self.stage.against(
            ModuleSolver(self.plan, self.expert_inputs, anchor, samples, prior),
            NormSolver(self.plan, self.expert_inputs, anchor, prior),
        )
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(without_cache(self.model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(without_heads(self.model, {*self.stage.modules, *self.stage.norms}))
            self._scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bmm-hidden-")))
            self._folder = self._scratch
            self._order()
            self._resume()
            for number, stage in enumerate(track(self._stages(), "merging block by block", show=progress)):
                if number > self._done and self.stage.left:
                    self._carry_out(number, stage)
                    release_free_memory()
        if self.both.reads is not None:
            self.both.reads.complete = True
        if never := sorted(self.stage.left & set(self.stage.modules)):
            self._warn_of(never)
        if self.stage.routed:
            more = f" (and {len(self.stage.routed) - 1} more like it)" if len(self.stage.routed) > 1 else ""
            self.report(f"warning: {next(iter(self.stage.routed.values()))}{more}")
        if self.options.target == "stream" and not any(record.stream for record in self.inputs):
            self.report(
                "none of the merged modules writes straight to a residual stream: all are aimed at what the expert's modules give"
            )
        if never := sorted(self.stage.left & set(self.stage.norms)):
            self.report(
                f"{len(never)} normalisations are never called, the first is {never[0]}; they stay as the anchor has them"
            )

    def _order(self) -> None:
        """Find the chains of blocks on the first batch."""
        passage = self.both.merged[0]
        why = self.skeleton.order(passage.read, to_device(passage.batches[0], self.skeleton.device))
        if why is not None and self.options.token_rows != "all":
            raise ConfigError(
                f"token_rows = {self.options.token_rows!r} needs blocks, and the model is walked as a whole ({why}); say token_rows: all."
            )
        if why is not None:
            self.report(f"the model is walked as a whole, not block by block: {why}")

    def _stages(self) -> list[Stage]:
        """In order: what stands before a chain of blocks, its blocks, and so on; at the end what comes after the last."""
        found: list[Stage] = []
        for chain in self.skeleton.chains:
            found.append(chain)
            found.extend(block for block in self.skeleton.blocks if block[0] == chain)
        return [*found, None]

    @property
    def _one_chain(self) -> bool:
        return len(self.skeleton.chains) == 1

    def _hidden_states(self, name: str, chain: int) -> HiddenStates:
        # Of one chain the hidden states are kept, and a walk goes on there; of several the finished blocks are run again.
        keep, dtype = self.sweep.resumable and self._one_chain, self.options.hidden_dtype or self.skeleton.dtype
        name = name if self._one_chain else f"{name}-{chain}"
        found = HiddenStates(name, self._room, dtype, run_dtype=self.skeleton.dtype, keep=keep)
        found.into(self._folder)
        return found

    def _resume(self) -> None:
        self._done = self.sweep.finished
        for record in self.sweep.records:
            done = {name for raw in record["inputs"] for name in raw["modules"]}
            self.stage.left -= {live for live, module in self.stage.modules.items() if module.name in done}
            self.stage.left -= {
                live for live, norm in self.stage.norms.items() if norm.weight.removesuffix(".weight") in done
            }
        if self._done < 0 or not self.stage.left:
            return
        self.report(f"going on after {self.sweep.records[-1]['stage']}")
        if not self._one_chain:
            self._done = -1
            return
        found = self.sweep.hidden_index()
        assert found is not None
        folder, index = found
        for passage, whose in self._named():
            hidden = self._hidden_states(whose, 0)
            hidden.resume(folder, index[hidden.name])
            passage.begin(self.skeleton, self.skeleton.chains[0], self.options.mask, resumed=hidden)

    def _named(self) -> list[tuple[Passage, str]]:
        """The passages that run, and what their hidden states are called."""
        both = (("expert", self.both.experts), ("merged", self.both.merged))
        return [(p, f"{whose}-{t}") for whose, own in both for t, p in enumerate(own) if p in self.both.running]

    def _carry_out(self, number: int, stage: Stage) -> None:
        self.stage.now = Solved()
        scratch = self._scratch / f"stage-{number:03d}"
        if number <= self.sweep.finished:  # run again, for its hidden states
            self._at(stage, scratch)
            return
        with self.sweep.stage(number) as folder:
            label = self._at(stage, folder if self._one_chain else scratch)
            kept = self._one_chain and bool(self.stage.left)
            record = {
                "stage": label,
                "inputs": [asdict(r) for r in self.stage.now.inputs],
                "modules": [asdict(r) for r in self.stage.now.modules],
                "hidden": {p.hidden.name: p.hidden.layout() for p in self.both.running if p.hidden is not None}
                if kept
                else {},
            }
            path = self.sweep.publish(number, self.stage.now.tensors, record)
        if path is not None and self._one_chain:
            for passage in self.both.running:
                if passage.hidden is not None:
                    passage.hidden.moved(path)
        for own in self.stage.now.inputs:
            self.report(_line(own))

    def _at(self, stage: Stage, folder: Path) -> str:
        """Carry out a stage; its hidden states go to `folder` where they find no room. Returns what it is called."""
        self._folder = folder
        for passage in self.both.running:
            if passage.hidden is not None:
                passage.hidden.into(folder)
        if stage is None:
            label = self._after_blocks() if self.skeleton.chains else self._whole()
        elif isinstance(stage, str):
            label = self._before_blocks(stage)
        else:
            label = self._block(stage)
        for passage in self.both.running:
            if passage.hidden is not None:
                passage.hidden.turn()
        for old in self._scratch.iterdir():
            if old != folder:
                shutil.rmtree(old)
        return label

    # The stages

    def _before_blocks(self, chain: str) -> str:
        first = chain == self.skeleton.chains[0]
        label, device = "before the blocks" if first else f"before {chain}", self.skeleton.device
        outside = [live for live in self.stage.left if self.skeleton.place(live) is None]
        if not first:
            for passage in self.both.running:
                passage.end()

        def run_of(passage: Passage) -> Run:
            model = Weighted(self.model, self._outside(passage))

            def run(batch: int) -> None:
                with passage.walks[-1].through(model, batch) if passage.walks else nullcontext():
                    before_blocks(model, chain, to_device(passage.batches[batch], device))

            return run

        if outside:
            self.stage.solve(label, outside, run_of, self.inputs)
        if self.stage.left:
            for passage in self.both.running:
                passage.begin(self.skeleton, chain, self.options.mask)
        return label

    def _block(self, place: Block) -> str:
        skeleton, label, index = self.skeleton, label_of(place), place[1]
        inside = [live for live in self.stage.left if skeleton.place(live) == place]
        block = skeleton.block(place)

        passages = self.both.running
        shared = skeleton.within(place, skeleton.inside(place, self._read_merged))
        for passage in passages:
            passage.replay = self._replay(block, passage)
            own = passage in self.both.experts
            passage.tensors = skeleton.within(place, skeleton.inside(place, passage.read)) if own else shared
        goes_on = set(inside) != self.stage.left
        advanced = False
        if inside:
            advanced = self.stage.solve(
                label,
                inside,
                lambda passage: passage.through(index, block),
                self.inputs,
                block,
                shared,
                advance=goes_on,
                tokens=self._tokens(place),
            )
        for passage in passages:
            if goes_on and not (advanced and passage in self.both.experts):
                passage.finished = ()
                run = passage.through(index, block)
                for batch in range(len(passage.batches)):
                    passage.walking().advance(batch, run(batch))
        self._clear(passages)
        return label

    def _tokens(self, place: Block) -> TokenRows | None:
        """Which rows count more in a block: in none but the last of the last chain."""
        options, (chain, index) = self.options, place
        last = chain == self.skeleton.chains[-1]
        if options.token_rows == "all" or not last:
            return None
        count = len(block_list(self.model, chain))
        return TokenRows(options.token_rows, options.token_weight) if index >= count - options.token_blocks else None

    def _after_blocks(self) -> str:
        label = "after the blocks"

        def run_of(passage: Passage) -> Run:
            model = Weighted(self.model, self._outside(passage))
            return lambda b: passage.walking().finish(b, model)

        self.stage.solve(label, sorted(self.stage.left), run_of, self.inputs)
        return label

    def _whole(self) -> str:
        """All modules in one stage, of the whole model."""
        label, passages = "the whole model", self.both.running
        shared = self._outside(self.both.merged[0])
        for passage in passages:
            passage.replay = self._replay(self.model, passage)
            passage.tensors = self._outside(passage) if passage in self.both.experts else shared
        device = self.skeleton.device
        self.stage.solve(
            label,
            sorted(self.stage.left),
            lambda passage: passage.whole(self.model, device),
            self.inputs,
            self.model,
            shared,
            prefix="",
        )
        self._clear(passages)
        return label

    def _outside(self, passage: Passage) -> dict[str, Tensor]:
        return self.skeleton.outside(passage.read, heads=self._heads)

    def _replay(self, block: nn.Module, passage: Passage) -> Replay:
        # On a GPU it is faster to compute again than to keep on the CPU.
        room = self._room if self.skeleton.device.type == "cpu" else Room(0)
        return Replay(block, room, len(passage.batches))

    @staticmethod
    def _clear(passages: Iterable[Passage]) -> None:
        for passage in passages:
            passage.tensors, passage.finished = {}, ()
            if passage.replay is not None:
                passage.replay.clear()
                passage.replay = None

    def _read_merged(self, name: str) -> Tensor:
        """The merged network's tensor as far as it is solved, the anchor's elsewhere."""
        if name in self.stage.now.tensors:
            return self.stage.now.tensors[name]
        return self.sweep.load(name) if name in self.sweep else self.anchor.load(name)

    def _warn_of(self, never: Sequence[str]) -> None:
        """Modules (live names) that no batch calls stay as the anchor has them. Raises `CollectionError` where they were named, or it is all."""
        first = self.stage.modules[never[0]].name
        told = f"{len(never)} of {len(self.stage.modules)} linear modules are never called by the calibration batches, the first is {first!r}"
        if self.plan.settings.modules is not None or len(never) == len(self.stage.modules):
            raise CollectionError(f"{told}. Leave them out with `modules`, or give batches that reach them.")
        self.report(f"warning: {told}; they stay as the anchor has them")


def _as_record(kind: Any, raw: dict[str, Any]) -> Any:
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()})


def _line(record: InputRecord) -> str:
    def mean(values: Sequence[float | None]) -> str:
        known = [v for v in values if v is not None]
        return f"{sum(known) / len(known):.3f}" if known else "-"

    more = f" and {len(record.modules) - 1} more" if len(record.modules) > 1 else ""
    where = " (of the stream after it)" if record.stream else ""
    return f"{record.modules[0]}{more}: relative residual{where} {mean(record.before)} with the anchor, {mean(record.after)} solved"

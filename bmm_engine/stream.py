"""Stage 4: carry out a plan module by module, in bounded memory: read, anchor, solve, assemble, hand on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bmm_engine.align import float_dtype
from bmm_engine.architecture import LinearModule
from bmm_engine.errors import GramMismatchError
from bmm_engine.grams import GramAccumulator, GramSet, weight_fingerprint
from bmm_engine.memory import release_free_memory
from bmm_engine.moments import DenseMoment, Moment, TaskVectorMoment, hybrid_moment
from bmm_engine.plan import MergePlan, ModuleGroup, resolve_module
from bmm_engine.solve import Factor, check_finite, energy_weights, factorize, solve_with_factor, task_energy

# Elementwise rules work on slabs of this many elements, so that a large embedding never exists T + 2 times in float32.
SLAB_ELEMENTS = 8 * 2**20
# A Gram up to this size stays in memory while its group is solved; a larger one is read again for each use.
KEPT_GRAM_BYTES = 64 * 2**20
# Factorisations of one width are batched up to this many bytes: on a GPU the batch is what keeps it busy, on a CPU it would only cost memory.
BATCH_BYTES = {"cuda": 2**30}


@dataclass(frozen=True)
class Piece:
    """A finished tensor, or the `rows` of one."""

    name: str
    tensor: Tensor
    rows: slice | None = None


@dataclass(frozen=True)
class ModuleRecord:
    """What happened to one module: the ridge and jitter of its factor, the task weights, and `shift = ||W* - W_a|| / ||W_a - W_0||`."""

    module: str
    shape: tuple[int, int]
    ridge: float
    jitter: float
    task_weights: tuple[float, ...]
    shift: float


class MergeStream:
    """Iterate to get every tensor of the merged model, in pieces; `records` fills as modules are solved."""

    def __init__(self, plan: MergePlan):
        self.plan = plan
        self.settings = plan.settings
        self.base = plan.alignment.base
        self.experts = plan.alignment.experts
        self.rule = plan.settings.rule
        self.parameters = self.rule.parameters(plan.settings.anchor_parameters)
        self.device = torch.device(plan.settings.device)
        self.dtype = float_dtype(self.base.spec(n).dtype for n in plan.alignment.merged)
        self.records: list[ModuleRecord] = []
        self._linear_by_weight = {m.weight: m for m in plan.linear.values()}

    def __len__(self) -> int:
        """Steps for a progress bar: modules, and slabs of the other tensors."""
        return self.plan.module_count + sum(1 for name in self._others() for _ in self._slabs(name))

    def __iter__(self) -> Iterator[list[Piece]]:
        if self.plan.groups:
            self._check_first_grams(self.plan.groups[0])
        if self.rule.reduce is not None:
            self.parameters["state"] = self.rule.reduce(self._whole_model, **self.parameters)
        for batch in self._batches():
            yield from self._solve_batch(batch)
            release_free_memory()
        for name in self.plan.from_anchor:
            for rows in self._slabs(name):
                yield [Piece(name, self._anchor_tensor(name, rows).cpu(), rows)]
        for name in self.plan.from_base:
            for rows in self._slabs(name):
                yield [Piece(name, self.base.load(name, rows), rows)]

    def _others(self) -> tuple[str, ...]:
        return self.plan.from_anchor + self.plan.from_base

    # Reading

    def _load(self, source: Any, name: str, rows: slice | None = None) -> Tensor:
        tensor = source.load(name, rows).to(self.device, self.dtype)
        check_finite(tensor, f"{source.label}, tensor {name!r}")
        return tensor

    def _oriented(self, source: Any, module: LinearModule, with_bias: bool) -> Tensor:
        """The weight as (out, in), or [W | b] as (out, in + 1)."""
        weight = self._load(source, module.weight)
        weight = weight.mT.contiguous() if module.transposed else weight
        return torch.cat([weight, self._load(source, module.bias)[:, None]], 1) if with_bias else weight

    def _slabs(self, name: str) -> Iterator[slice | None]:
        shape = self.base.spec(name).shape
        linear = self.rule.scope == "module" and name in self._linear_by_weight
        size = math.prod(shape)
        if (
            linear
            or len(shape) < 2
            or size <= SLAB_ELEMENTS
            or not (self.rule.elementwise or self.rule.scope == "module")
        ):
            yield None
            return
        step = max(1, SLAB_ELEMENTS * shape[0] // size)
        for start in range(0, shape[0], step):
            yield slice(start, min(start + step, shape[0]))

    def _whole_model(self) -> Iterable[tuple[str, Tensor, Sequence[Tensor]]]:
        for name in self.plan.alignment.merged:
            for rows in self._slabs(name):
                yield name, self._load(self.base, name, rows), [self._load(e, name, rows) for e in self.experts]

    # The anchor

    def _anchor_tensor(self, name: str, rows: slice | None) -> Tensor:
        """A tensor that is not solved, as the anchor has it (in its stored orientation)."""
        module = self._linear_by_weight.get(name)
        if self.rule.scope == "module" and module is not None:
            base = self._oriented(self.base, module, False)
            merged = self.rule.rule(base, [self._oriented(e, module, False) for e in self.experts], **self.parameters)
            return merged.mT.contiguous() if module.transposed else merged
        base, experts = self._load(self.base, name, rows), [self._load(e, name, rows) for e in self.experts]
        return (
            self._other(base, experts)
            if self.rule.scope == "module"
            else self.rule.rule(base, experts, **self.parameters)
        )

    def _other(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """What a rule for matrices leaves open takes the mean of the experts."""
        return torch.stack([e - base for e in experts]).mean(0).add_(base)

    def _anchor_module(self, base: Tensor, experts: Sequence[Tensor], with_bias: bool) -> Tensor:
        if not with_bias:
            return self.rule.rule(base, experts, **self.parameters)
        weight = self.rule.rule(base[:, :-1].contiguous(), [e[:, :-1].contiguous() for e in experts], **self.parameters)
        biases = base[:, -1].contiguous(), [e[:, -1].contiguous() for e in experts]
        bias = self._other(*biases) if self.rule.scope == "module" else self.rule.rule(*biases, **self.parameters)
        return torch.cat([weight, bias[:, None]], 1)

    # The solve

    def _batches(self) -> Iterator[list[ModuleGroup]]:
        budget = BATCH_BYTES.get(self.device.type, 0)
        batch: list[ModuleGroup] = []
        for group in self.plan.groups:
            width = group.width + group.with_bias
            full = (len(batch) + 1) * 8 * width**2 > budget
            if batch and (full or batch[0].width + batch[0].with_bias != width):
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    def _solve_batch(self, batch: list[ModuleGroup]) -> Iterator[list[Piece]]:
        opened = [_OpenGroup(self, group) for group in batch]
        betas = [group.task_weights() for group in opened]
        factors = factorize(
            [g.moments for g in opened],
            betas,
            alpha=self.settings.alpha,
            names=[g.group.name for g in opened],
            device=self.device,
        )
        for group, factor in zip(opened, factors, strict=True):
            for module in group.group.members:
                yield self._solve_module(group, module, factor)

    def _solve_module(self, group: _OpenGroup, module: LinearModule, factor: Factor) -> list[Piece]:
        with_bias = group.group.with_bias
        base, experts = group.weights(module)
        anchor = self._anchor_module(base, experts, with_bias)
        solved = solve_with_factor(anchor, experts, group.moments, factor)
        moved = float((anchor - base).norm())
        shift = float((solved - anchor).norm()) / moved if moved else 0.0
        shape = (module.out_features, module.in_features)
        self.records.append(ModuleRecord(module.name, shape, factor.ridge, factor.jitter, factor.task_weights, shift))
        merged = solved if self.settings.scale == 1 else base + self.settings.scale * (solved - base)
        return self._pieces(module, merged, with_bias)

    def _pieces(self, module: LinearModule, merged: Tensor, with_bias: bool) -> list[Piece]:
        weight = merged[:, :-1] if with_bias else merged
        weight = weight.mT if module.transposed else weight
        pieces = [Piece(module.weight, weight.contiguous().cpu())]
        return [*pieces, Piece(module.bias, merged[:, -1].contiguous().cpu())] if with_bias else pieces

    # Grams

    def _check_first_grams(self, group: ModuleGroup) -> None:
        """A Gram of another model shows at its first module: find out before hours of work."""
        if self.settings.gram_source == "task_vectors":
            return
        for t in range(len(self.experts)):
            for module in group.members:
                self.check_fingerprint(t, module)

    def check_fingerprint(self, t: int, module: LinearModule) -> None:
        """Raise `GramMismatchError` unless the Gram set of expert `t` was measured on this very weight."""
        grams, expert = self.plan.gram_sets[t], self.experts[t]
        own = resolve_module(grams, expert, module.name)
        recorded = grams.fingerprints.get(own)
        if recorded is None:
            return
        found = weight_fingerprint(expert.load(module.weight), getattr(torch, grams.weights_dtype))
        if found != recorded:
            raise GramMismatchError(
                f"{grams.where}: measured on another model than {expert.label}: the weight of {module.name!r} has hash {found}, the Gram was"
                f" measured with {recorded}. Collect it again from this expert, and list Grams in the order of the experts."
            )


class _OpenGroup:
    """One group at work: its moments, and its members' weights, read when needed."""

    def __init__(self, stream: MergeStream, group: ModuleGroup):
        self.stream = stream
        self.group = group
        self._weights: dict[str, tuple[Tensor, list[Tensor]]] = {}
        self.moments: list[Moment] = [self._moment(t) for t in range(len(stream.experts))]

    def weights(self, module: LinearModule) -> tuple[Tensor, list[Tensor]]:
        """Base and experts (out, in [+ 1]); those of a single-module group are kept, since its moments may need them too."""
        if module.name in self._weights:
            return self._weights[module.name]
        stream, with_bias = self.stream, self.group.with_bias
        found = (
            stream._oriented(stream.base, module, with_bias),
            [stream._oriented(e, module, with_bias) for e in stream.experts],
        )
        if len(self.group.members) == 1:
            self._weights[module.name] = found
        return found

    def task_weights(self) -> tuple[float, ...]:
        given = self.stream.settings.task_weights
        if given == "none":
            return (1.0,) * len(self.moments)
        if not isinstance(given, str):
            return tuple(given)
        energies = [0.0] * len(self.moments)
        for module in self.group.members:
            base, experts = self.weights(module)
            for t, (moment, expert) in enumerate(zip(self.moments, experts, strict=True)):
                energies[t] += task_energy(moment, expert - base)
        return energy_weights(energies)

    def _moment(self, t: int) -> Moment:
        settings = self.stream.settings
        if settings.gram_source == "data":
            return self._data_moment(t)
        base, experts = self.weights(self.group.members[0])
        task_vector = experts[t] - base
        if settings.gram_source == "task_vectors":
            return TaskVectorMoment(task_vector, settings.normalization)
        return hybrid_moment(self._data_moment(t), task_vector, settings.hybrid_share)

    def _data_moment(self, t: int) -> Moment:
        stream, group = self.stream, self.group
        grams = stream.plan.gram_sets[t]
        for module in group.members:
            stream.check_fingerprint(t, module)
        own = resolve_module(grams, stream.experts[t], group.name)
        width = group.width + group.with_bias

        def load() -> Tensor:
            return _total(grams, own, group.with_bias).to(stream.device)

        kept = load() if 4 * width * width <= KEPT_GRAM_BYTES else None
        return DenseMoment(load if kept is None else kept, grams.rows(own), width=width, module=group.name)


def _total(grams: GramSet, module: str, with_bias: bool) -> Tensor:
    """`sum x x^T` (in, in), or of [x, 1] (in + 1, in + 1)."""
    gram: GramAccumulator = grams.get(module)
    if not with_bias:
        return gram.total
    augmented = gram.total.new_empty(gram.width + 1, gram.width + 1)
    augmented[:-1, :-1] = gram.total
    augmented[-1, :-1] = augmented[:-1, -1] = gram.row_sum
    augmented[-1, -1] = gram.rows
    return augmented

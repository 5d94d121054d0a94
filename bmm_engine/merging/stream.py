"""Stage 4: carry out a plan module by module, in bounded memory: read, anchor, solve, assemble, hand on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from bmm_engine.anchors import Site
from bmm_engine.anchors.contract import GRAMS
from bmm_engine.errors import NonFiniteWeightError
from bmm_engine.memory import release_free_memory
from bmm_engine.merging.calibrator import Calibrator
from bmm_engine.merging.groups import OpenGroup
from bmm_engine.merging.inputs import Inputs
from bmm_engine.merging.plan import MergePlan, ModuleGroup
from bmm_engine.models.architecture import LinearModule
from bmm_engine.parallel import in_order, one_thread, share_of_memory
from bmm_engine.solving.agreement import shrunk
from bmm_engine.solving.filters import SpectralFactor
from bmm_engine.solving.moments import Moment
from bmm_engine.solving.posterior import Posterior, posterior_sample, posterior_scale
from bmm_engine.solving.solve import Factor, check_finite, inverses, overshot, solve_with_factor
from bmm_engine.solving.weighted import solve_weighted

T = TypeVar("T")

# Elementwise rules work on slabs of this many elements, so that a large embedding never exists T + 2 times in float32.
SLAB_ELEMENTS = 4 * 2**20
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
    """What happened to one module: the ridge and jitter of its factor, the task weights, and `shift = ||W* - W_a|| / ||W_a - W_0||`.

    `tau`: of a draw from the posterior, the scale of its noise (0: the MAP itself); see `bmm_engine.solving.posterior`.
    """

    module: str
    shape: tuple[int, int]
    ridge: float
    jitter: float
    task_weights: tuple[float, ...]
    shift: float
    tau: float = 0.0


@dataclass(frozen=True)
class InputRecord:
    """What a sequential merge found at one input of the network: the modules solved there and, per expert as listed, its task weight and its relative
    residual `||X~ W^T - X W_t^T|| / ||X U_t^T||` with the anchor's weights (overshot, where the prior is) and with the solved ones; None where
    fine-tuning changed nothing. `change`: `||X U_t^T||^2 / n`; `energy`: the same in the task's output metric, where there is one. `stream`: the
    module writes to the residual stream and was aimed at what that holds after it: then the numerator is how far this is from the expert's, `||S~ +
    X~ W^T - S - X W_t^T||`, and the denominator adds up the `change` of all modules that have written to it, as energy weights do the `energy`."""

    stage: str
    modules: tuple[str, ...]
    alpha: float
    ridge: float
    jitter: float
    task_weights: tuple[float, ...]
    before: tuple[float | None, ...]
    after: tuple[float | None, ...]
    change: tuple[float, ...]
    energy: tuple[float, ...]
    stream: bool = False


class MergeStream:
    """Iterate to get every tensor of the merged model, in pieces; `records` fills as modules are solved, `diagnostics` as the anchor is made.

    `finish`: what is done to each piece as soon as it is there (the cast to its final dtype), by the thread that made it. It is the `Model`
    that the rule's reduction sees. `posterior`: solved modules get a draw instead of the MAP.
    """

    def __init__(
        self,
        plan: MergePlan,
        finish: Callable[[Piece], Piece] = lambda piece: piece,
        posterior: Posterior | None = None,
    ):
        self.plan = plan
        self.finish = finish
        self.posterior = posterior
        self.inputs = Inputs(plan)
        self.settings = plan.settings
        self.base = plan.alignment.base
        self.rule = plan.settings.rule
        self.needs_grams = bool(plan.settings.anchor_needs & GRAMS)
        self.records: list[ModuleRecord] = []
        self.state: Any = None
        self.calibrator = Calibrator(self.inputs)
        self._diagnostics: dict[str, dict[str, float]] = {}
        self.workers = torch.get_num_threads()
        self._linear_by_weight = {m.weight: m for m in plan.linear.values()}

    def __len__(self) -> int:
        """Steps for a progress bar: modules, and slabs of the other tensors."""
        return self.plan.module_count + sum(1 for name in self._others() for _ in self._slabs(name))

    @property
    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Tensor -> what the anchor's rule found out there, in the model's order."""
        return {name: self._diagnostics[name] for name in self.plan.alignment.merged if name in self._diagnostics}

    def __iter__(self) -> Iterator[list[Piece]]:
        self.inputs.check_first()
        if self.calibrator.looks_first:
            names = self.calibrator.modules
            self.calibrator.settle(self._at_once((self._bytes(n, None), self.calibrator.diagnosis(n)) for n in names))
        if self.rule.reduce is not None:
            with one_thread():
                self.state = self.rule.reduce(self)
        for batch in self._batches():
            yield from self._solve_batch(batch)
            release_free_memory()
        tasks = (
            (self._bytes(name, rows), self._other_piece(name, rows))
            for name in self._others()
            for rows in self._slabs(name)
        )
        for piece in self._at_once(tasks):
            yield [piece]

    def _others(self) -> tuple[str, ...]:
        return self.plan.from_anchor + self.plan.from_base

    # The model as a reduction sees it

    def sites(self) -> Iterator[Site]:
        return self.map(lambda site: site)

    def map(self, function: Callable[[Site], T]) -> Iterator[T]:
        def work(name: str, rows: slice | None) -> Callable[[], T]:
            def at_site() -> T:
                site = self._site(name, rows)
                with self._naming(site):
                    return function(site)

            return at_site

        parts = ((name, rows) for name in self.plan.alignment.merged for rows in self._slabs(name))
        return self._at_once((self._bytes(name, rows), work(name, rows)) for name, rows in parts)

    def constant(self, parameter: str) -> Any:
        names, count = self.plan.alignment.merged, len(self.inputs.experts)
        value = self.inputs.parameters.constant(parameter, names, self.inputs.depth, count)
        return self.inputs.ordered(value) if self.inputs.parameters.settings[parameter].per_expert else value

    def _at_once(self, tasks: Iterator[tuple[int, Callable[[], T]]]) -> Iterator[T]:
        """On a CPU as many at once as torch may use threads; on a GPU one, so that reading and writing overlap with it."""
        workers = self.workers if self.inputs.device.type == "cpu" else 1
        matrices = self.rule.linear or self.calibrator.modules
        return in_order(tasks, workers=workers, most_bytes=share_of_memory() if matrices else None)

    def _bytes(self, name: str, rows: slice | None) -> int:
        """About what the work on a tensor, or on some rows of it, holds at a time."""
        spec = self.base.spec(name)
        elements = math.prod(spec.shape) if rows is None else math.prod(spec.shape[1:]) * (rows.stop - rows.start)
        if name in self.plan.from_base:
            return elements * spec.dtype.itemsize
        if self._is_linear(name) or name in self.calibrator.modules:
            return 8 * elements * (len(self.plan.alignment.experts) + 4)  # factorisations are float64
        return elements * (
            4
            + sum(4 if not self.rule.stored else s.spec(name).dtype.itemsize for s in (self.base, *self.inputs.experts))
        )

    def _is_linear(self, name: str) -> bool:
        """Is it the weight of a linear module, for a rule that treats those apart?"""
        return self.rule.linear and name in self._linear_by_weight

    def _slabs(self, name: str) -> Iterator[slice | None]:
        whole = name in self.plan.from_anchor and not self._takes_parts(name)
        whole = whole or self._is_linear(name) or self.calibrator.takes_whole(name)
        return iter([None]) if whole else row_slabs(self.base.spec(name).shape)

    def _takes_parts(self, name: str) -> bool:
        return self.rule.scope == "module" or self.rule.takes_parts(self.inputs.at(name))

    def _site(self, name: str, rows: slice | None) -> Site:
        """A tensor as the rule gets it: of a linear module oriented, of others as they are stored."""
        if self._is_linear(name):
            module = self._linear_by_weight[name]
            return self._module_site(
                module,
                self.inputs.oriented(self.base, module, False),
                [self.inputs.oriented(e, module, False) for e in self.inputs.experts],
            )
        if self.rule.stored:
            base, *experts = (
                source.load(name, rows).to(self.inputs.device) for source in (self.base, *self.inputs.experts)
            )
        else:
            base, *experts = (self.inputs.load(source, name, rows) for source in (self.base, *self.inputs.experts))
        shape = tuple(self.base.spec(name).shape)
        first = 0 if rows is None else rows.start * math.prod(shape[1:])
        fishers = self.inputs.fishers_at(name, rows)
        site = Site(name, base, experts, self.inputs.at(name), shape, first, fishers=fishers)
        return self.calibrator.before(site)

    def _module_site(
        self, module: LinearModule, base: Tensor, experts: Sequence[Tensor], moments: Sequence[Moment] = ()
    ) -> Site:
        """The site of a module's weight (out, in), already read."""
        grams = moments
        measured = module.name not in self.plan.unmeasured
        if self.needs_grams and not moments and measured:
            grams = OpenGroup(self.inputs, ModuleGroup((module,), module.in_features, math.inf)).moments
        fishers = self.inputs.fishers_at(module.weight)
        site = Site(
            module.weight,
            base,
            experts,
            self.inputs.at(module.weight),
            tuple(base.shape),
            linear=True,
            grams=grams if self.needs_grams else (),
            fishers=[f.mT.contiguous() for f in fishers] if module.transposed else fishers,
            sensitivities=self.inputs.sensitivities_at(module) if measured else (),
            low_rank=[self.inputs.low_rank(e, module) for e in self.inputs.experts],
        )
        return self.calibrator.before(site)

    # The anchor

    def _other_piece(self, name: str, rows: slice | None) -> Callable[[], Piece]:
        def work() -> Piece:
            if name in self.plan.from_base:
                return self.finish(Piece(name, self.base.load(name, rows), rows))
            site = self._site(name, rows)
            merged = self._anchor(site)
            if self._is_linear(name) and self._linear_by_weight[name].transposed:
                merged = merged.mT
            with self._naming(site):
                return self.finish(Piece(name, merged.contiguous(), rows))

        return work

    def _anchor(self, site: Site) -> Tensor:
        """The rule's merge, calibrated where that is asked for."""
        merged = self._by_rule(site)
        with self._naming(site):
            return self.calibrator.after(site, merged)

    def _by_rule(self, site: Site) -> Tensor:
        if self.rule.scope == "module" and not (site.linear and (site.grams or not self.needs_grams)):
            if self.rule.others == "first":
                return site.experts[0]
            scaling = {"mean": 1.0, "scaled": site.parameters.get("scaling", 1.0), "base": 0.0}[self.rule.others]
            return scaled_mean(site.base, site.experts, scaling)
        with self._naming(site):
            merged = self.rule.apply(site, self.state)
        if site.diagnostics:
            self._diagnostics[site.name] = dict(site.diagnostics)
        return merged

    @contextmanager
    def _naming(self, site: Site) -> Iterator[None]:
        """A `NonFiniteWeightError` that is raised meanwhile names tensor and model, where one of those at the site is not finite."""
        try:
            yield
        except NonFiniteWeightError:
            for source, tensor in zip((self.base, *self.inputs.experts), (site.base, *site.experts), strict=True):
                check_finite(tensor, f"{source.label}, tensor {site.name!r}")
            raise

    def _anchor_module(self, module: LinearModule, base: Tensor, experts: Sequence[Tensor], group: OpenGroup) -> Tensor:
        """The anchor's weight (out, in) of a module that is solved, or [W | b] (out, in + 1)."""
        with_bias = group.group.with_bias
        weight, weights = (
            (base[:, :-1].contiguous(), [e[:, :-1].contiguous() for e in experts]) if with_bias else (base, experts)
        )
        with one_thread():
            if self.rule.linear:
                merged = self._anchor(self._module_site(module, weight, weights, () if with_bias else group.moments))
            else:  # as it is stored: what depends on rows, or on where an entry lies, is the same as without a solve
                merged = self._anchor(self._plain_site(module.weight, module.transposed, weight, weights))
                merged = merged.mT.contiguous() if module.transposed else merged
            if not with_bias:
                return merged
            bias = self._anchor(self._plain_site(module.bias, False, base[:, -1], [e[:, -1] for e in experts]))
        return torch.cat([merged, bias[:, None]], 1)

    def _plain_site(self, name: str, transposed: bool, base: Tensor, experts: Sequence[Tensor]) -> Site:
        """The site of a whole tensor that has been read, turned to how it is stored."""
        base, *experts = ((t.mT if transposed else t).contiguous() for t in (base, *experts))
        fishers = self.inputs.fishers_at(name)
        site = Site(name, base, experts, self.inputs.at(name), tuple(base.shape), fishers=fishers)
        return self.calibrator.before(site)

    # The solve

    def _batches(self) -> Iterator[list[ModuleGroup]]:
        budget = BATCH_BYTES.get(self.inputs.device.type, 0)
        batch: list[ModuleGroup] = []
        for group in self.plan.groups:
            width = group.width + group.with_bias
            full = (len(batch) + 1) * 8 * width**2 > budget
            if batch and (full or (batch[0].width + batch[0].with_bias, batch[0].alpha) != (width, group.alpha)):
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    def _solve_batch(self, batch: list[ModuleGroup]) -> Iterator[list[Piece]]:
        opened = [OpenGroup(self.inputs, group) for group in batch]
        betas = [group.task_weights() for group in opened]
        factors = inverses(
            [g.moments for g in opened],
            betas,
            self.settings.spectral_filter,
            alpha=batch[0].alpha,
            names=[g.group.name for g in opened],
            device=self.inputs.device,
        )
        for group, factor in zip(opened, factors, strict=True):
            for module in group.group.members:
                yield self._solve_module(group, module, factor)

    def _solve_module(self, group: OpenGroup, module: LinearModule, factor: Factor | SpectralFactor) -> list[Piece]:
        with_bias = group.group.with_bias
        base, experts = group.weights(module)
        anchor = self._anchor_module(module, base, experts, group)
        prior = overshot(anchor, base, self.settings.prior)
        if group.metrics:
            solved = solve_weighted(prior, experts, group.moments, factor, group.metrics[module.name], module.name)
        else:
            solved = solve_with_factor(prior, experts, group.moments, factor)
        moved = float((anchor - base).norm())
        shift = float((solved - anchor).norm()) / moved if moved else 0.0
        shape = (module.out_features, module.in_features)
        listed = dict(zip(self.inputs.order, factor.task_weights, strict=True))
        weights = tuple(listed[t] for t in range(len(listed)))
        tau = 0.0
        if self.posterior is not None and self.posterior.temperature:
            assert isinstance(factor, Factor), "merges refuse draws of other filters"
            temperature = self.posterior.temperature
            tau = posterior_scale(solved, experts, group.moments, factor, temperature, name=module.name)
            solved = posterior_sample(solved, factor, tau, self.posterior.generator(module.name))
        self.records.append(ModuleRecord(module.name, shape, factor.ridge, factor.jitter, weights, shift, tau))
        scale = self.settings.scale_setting.at(
            module.weight, self.inputs.depth(module.weight), len(self.inputs.experts)
        )
        scale = shrunk(scale, self.settings.shrinkage, base, experts)
        merged = solved if scale == 1 else base + scale * (solved - base)
        return [self.finish(piece) for piece in self._pieces(module, merged, with_bias)]

    def _pieces(self, module: LinearModule, merged: Tensor, with_bias: bool) -> list[Piece]:
        weight = merged[:, :-1] if with_bias else merged
        weight = weight.mT if module.transposed else weight
        pieces = [Piece(module.weight, weight.contiguous())]
        return [*pieces, Piece(module.bias, merged[:, -1].contiguous())] if with_bias else pieces


def row_slabs(shape: Sequence[int]) -> Iterator[slice | None]:
    """The runs of rows of about `SLAB_ELEMENTS` that make up a tensor; None where it is all one."""
    size = math.prod(shape)
    if len(shape) < 2 or size <= SLAB_ELEMENTS:
        yield None
        return
    step = max(1, SLAB_ELEMENTS * shape[0] // size)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def scaled_mean(base: Tensor, experts: Sequence[Tensor], scaling: float) -> Tensor:
    """What a rule for matrices leaves open: `W_0 + a mean_t (W_t - W_0)`."""
    out = torch.zeros_like(base)
    for expert in experts if scaling else ():
        out += expert - base
    return out.mul_(scaling / len(experts)).add_(base)

"""The modules that read one input: measure what is needed there, and solve them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bmm_engine.checkpoint import TensorSource
from bmm_engine.merging.inputs import Inputs
from bmm_engine.merging.plan import MergePlan
from bmm_engine.merging.stream import InputRecord, ModuleRecord
from bmm_engine.models.architecture import LinearModule
from bmm_engine.models.calling import Padding, kept_rows
from bmm_engine.ops.lowrank import LowRank
from bmm_engine.sequential.accumulators import Accumulator, DriftAccumulator, ProjectedAccumulator
from bmm_engine.sequential.moments import TaskMoments
from bmm_engine.sequential.reading import Read
from bmm_engine.sequential.solve import (
    drift_factor,
    relative_residuals,
    solve_module,
    solve_weighted_module,
)
from bmm_engine.sequential.tokens import TokenRows
from bmm_engine.solving.output_metric import OutputMetric
from bmm_engine.solving.solve import overshot
from bmm_engine.solving.task_weights import choose_task_weights


@dataclass(frozen=True)
class Solved:
    """Tensors by the base's names, as its files hold them but for the dtype; and the records."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[InputRecord] = field(default_factory=list)
    modules: list[ModuleRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """Of the modules that read one input, those with one ridge, and all or none of them with a bias to solve."""

    members: tuple[LinearModule, ...]
    alpha: float
    with_bias: bool

    @property
    def outputs(self) -> list[slice]:
        """Where each member's outputs are in the stack of all."""
        stops = list(accumulate(module.out_features for module in self.members))
        return [slice(stop - m.out_features, stop) for stop, m in zip(stops, self.members, strict=True)]


@dataclass(frozen=True)
class Written:
    """What fine-tuning changed in the residual stream before a module that writes to it, for each expert as listed: `change` and `energy` of
    `InputRecord`, summed over the modules that have written to it."""

    change: Sequence[float]
    energy: Sequence[float]

    @classmethod
    def by(cls, records: Iterable[InputRecord], experts: int) -> Written:
        writers = [record for record in records if record.stream]
        return cls(
            *([sum(getattr(r, key)[t] for r in writers) for t in range(experts)] for key in ("change", "energy"))
        )


class ModuleSolver:
    """Solves a plan's linear modules against an anchor's tensors (float32 or wider, by the base's names)."""

    def __init__(
        self,
        plan: MergePlan,
        inputs: Inputs,
        anchor: TensorSource,
        samples: Sequence[int],
        prior: float = 1.0,
    ):
        """`samples`: of each expert's calibration, in the inputs' order. `prior`: how far the ridge pulls, W_0 + prior (W_a - W_0)."""
        self.settings, self.inputs, self.anchor, self.prior = plan.settings, inputs, anchor, prior
        self._shares = [self.settings.sequential.hybrid_share(own) for own in samples]
        self._merged = set(plan.alignment.merged)

    def parts(self, modules: Sequence[LinearModule]) -> list[Part]:
        """What is to be solved of `modules`; those at an infinite ridge are the anchor's."""
        found: dict[tuple[float, bool], list[LinearModule]] = {}
        for module in modules:
            depth, count = self.inputs.depth(module.weight), len(self.inputs.experts)
            alpha = self.settings.alpha_setting.at(module.weight, depth, count)
            with_bias = self.settings.fit_bias and module.has_bias and module.bias in self._merged
            if alpha != math.inf:
                found.setdefault((alpha, with_bias), []).append(module)
        return [Part(tuple(members), *key) for key, members in found.items()]

    def accumulator(self, parts: Sequence[Part], t: int, dtype: torch.dtype, *, stream: bool) -> Accumulator:
        """For what expert `t` (in the inputs' order) and the merged network read there, of the cheaper kind. `stream`: what they write is added
        to the residual stream, whose drift counts."""
        part, device = parts[0], self.inputs.device
        name, width = part.members[0].name, part.members[0].in_features
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        outputs = sum(m.out_features for m in part.members)
        # Products for each row: 4 in^2 against in^2 + 6 in out.
        if not stream and (len(parts) > 1 or 2 * outputs > width):
            return DriftAccumulator(width, name=name, dtype=wide, device=device)
        experts = torch.cat([self._expert(t, m, part.with_bias) for m in part.members])
        bases = torch.cat([self._base(m, part.with_bias) for m in part.members])
        return ProjectedAccumulator(
            experts,
            experts - bases,
            with_bias=part.with_bias,
            whole_change=self.inputs.weighted,
            name=name,
            dtype=wide,
            device=device,
        )

    def solve(
        self,
        stage: str,
        parts: Sequence[Part],
        measured: list[Accumulator],
        out: Solved,
        *,
        written: Written | None = None,
    ) -> None:
        """Solve the modules of `parts`, which read what was `measured` for each expert (in the inputs' order), into `out`.

        `written`: where they write to the residual stream, what fine-tuning changed there before.
        Empties `measured`: moments with a bias are a copy.
        """
        for part in parts:
            moments: list[TaskMoments] = []
            for t in range(len(measured)):
                own = measured[t] if part is not parts[-1] else measured.pop(0)
                moments.append(own.moments(with_bias=part.with_bias))
                del own
            self._solve_part(stage, part, moments, out, written)

    def _solve_part(
        self,
        stage: str,
        part: Part,
        moments: Sequence[TaskMoments],
        out: Solved,
        written: Written | None,
    ) -> None:
        inputs, with_bias, name = self.inputs, part.with_bias, part.members[0].name
        metrics = inputs.output_metrics(part.members, self._task_vector) if inputs.weighted else None
        change = [own.energy(self._task_vectors(t, part)) / own.rows for t, own in enumerate(moments)]
        energy = change if metrics is None else self._weighted_energies(part, moments, metrics)
        changes, energies = change, energy
        if written is not None:
            changes, energies = (
                [own + before for own, before in zip(now, inputs.ordered(earlier), strict=True)]
                for now, earlier in ((change, written.change), (energy, written.energy))
            )
        betas = choose_task_weights(inputs.task_weights, energies, (own.norm for own in moments), len(moments), name)
        mean_weight = self.settings.sequential.mean_weight
        moments = [own.toward(self.settings.sequential.drift) for own in moments]
        moments = [self._hybrid(t, part, own) for t, own in enumerate(moments)]
        chosen = self.settings.spectral_filter
        factor = drift_factor(moments, betas, chosen, alpha=part.alpha, mean_weight=mean_weight, name=name)
        assert factor is not None, "no part is at an infinite ridge"
        before, after = ([0.0] * len(moments) for _ in range(2))
        listed = inputs.listed(betas)
        for m, (module, outputs) in enumerate(zip(part.members, part.outputs, strict=True)):
            anchor = inputs.oriented(self.anchor, module, with_bias)
            base = self._base(module, with_bias)
            experts = [self._expert(t, module, with_bias) for t in range(len(moments))]
            own_moments = [own.of(outputs) for own in moments]
            given = (overshot(anchor, base, self.prior), experts, own_moments)
            if metrics is None:
                solved, *misfits = solve_module(*given, betas, factor, mean_weight)
            else:
                solved, *misfits = solve_weighted_module(*given, factor, mean_weight, metrics[m], module.name)
            for total, own in zip((before, after), misfits, strict=True):
                total[:] = [a + b for a, b in zip(total, own, strict=True)]
            moved = float((anchor - base).norm())
            shift = float((solved - anchor).norm()) / moved if moved else 0.0
            shape = (module.out_features, module.in_features)
            out.modules.append(ModuleRecord(module.name, shape, factor.ridge, factor.jitter, listed, shift))
            scale = self.settings.scale_setting.at(module.weight, inputs.depth(module.weight), len(moments))
            self._put(module, solved if scale == 1 else base + scale * (solved - base), with_bias, out)
        first, last = (inputs.listed(relative_residuals(total, changes)) for total in (before, after))
        out.inputs.append(
            InputRecord(
                stage,
                tuple(m.name for m in part.members),
                part.alpha,
                factor.ridge,
                factor.jitter,
                listed,
                first,
                last,
                change=inputs.listed(change),
                energy=inputs.listed(energy),
                stream=written is not None,
            )
        )

    def _hybrid(self, t: int, part: Part, own: TaskMoments) -> TaskMoments:
        if not self._shares[t]:
            return own
        return own.with_task_vector(torch.cat(list(self._task_vectors(t, part))), self._shares[t])

    def _weighted_energies(
        self, part: Part, moments: Sequence[TaskMoments], metrics: Sequence[Sequence[OutputMetric]]
    ) -> list[float]:
        """`tr(X_t U_t^T S_t U_t X_t^T) / n_t`, summed over the part's modules; `metrics` of each module, by expert."""
        return [
            sum(
                own.of(outputs).weighted_energy(task_vector, metric[t])
                for outputs, task_vector, metric in zip(part.outputs, self._task_vectors(t, part), metrics, strict=True)
            )
            / own.rows
            for t, own in enumerate(moments)
        ]

    def _base(self, module: LinearModule, with_bias: bool) -> Tensor:
        return self.inputs.oriented(self.inputs.base, module, with_bias)

    def _expert(self, t: int, module: LinearModule, with_bias: bool) -> Tensor:
        return self.inputs.oriented(self.inputs.experts[t], module, with_bias)

    def _task_vectors(self, t: int, part: Part) -> Iterator[Tensor]:
        for module in part.members:
            yield self._expert(t, module, part.with_bias) - self._base(module, part.with_bias)

    def _task_vector(self, t: int, module: LinearModule) -> Tensor | LowRank:
        """Of the weight, without its bias: (out, in)."""
        product = self.inputs.low_rank(self.inputs.experts[t], module)
        return self._expert(t, module, False) - self._base(module, False) if product is None else product

    def _put(self, module: LinearModule, merged: Tensor, with_bias: bool, out: Solved) -> None:
        weight = merged[:, :-1] if with_bias else merged
        out.tensors[module.weight] = (weight.mT if module.transposed else weight).contiguous()
        if with_bias:
            out.tensors[module.bias] = merged[:, -1].contiguous()


class Waiting:
    """Rows on their way into an accumulator (anything with `width`, `name`, `update`), some batches at a time: its kernels read and write all
    of the moments for each call."""

    BYTES = 16 * 2**20

    def __init__(
        self,
        accumulator: Any,
        dtype: torch.dtype,
        device: torch.device,
        *,
        outputs: int = 0,
        tokens: TokenRows | None = None,
    ):
        """`outputs`: width of the residual stream, whose drift is counted in; 0 where it is not. `tokens`: which rows count more."""
        self.accumulator, self.tokens = accumulator, tokens
        rows = max(1, self.BYTES // (accumulator.width * dtype.itemsize))
        widths = (accumulator.width, accumulator.width, *([outputs] if outputs else []))
        self._rows = [torch.empty(rows, width, dtype=dtype, device=device) for width in widths]
        self._weights = None if tokens is None else torch.empty(rows, dtype=torch.float64, device=device)
        self._filled = 0

    def add(self, expert: Read, merged: Read, padding: Padding | None, samples: int) -> None:
        """What both read of a batch; padding is left out. Raises `CollectionError`, and as `Accumulator.update`."""
        name, width, x = self.accumulator.name, self.accumulator.width, merged.x
        keep, dtype = None if padding is None else padding.rows(name, x), self._rows[0].dtype
        streams = []
        if merged.stream is not None and expert.stream is not None:  # hidden states may be kept in another dtype
            streams = [merged.stream.to(dtype) - expert.stream.to(dtype)]
        weights = None if self.tokens is None else self.tokens.weights(name, x, padding, samples)
        if expert.x.shape != x.shape or x.shape[-1] != width or x.dtype != dtype:
            self.flush()
            weights = weights if weights is None or keep is None else weights[keep]
            self._update(*(kept_rows(name, rows, padding) for rows in (expert.x, x, *streams)), weights=weights)
            return
        chosen = torch.arange(x.numel() // width, device=x.device) if keep is None else keep.nonzero()[:, 0]
        for rows in chosen.split(len(self._rows[0])):
            if self._filled + len(rows) > len(self._rows[0]):
                self.flush()
            into = slice(self._filled, self._filled + len(rows))
            for kept, given in zip(self._rows, (expert.x, x, *streams), strict=True):
                torch.index_select(given.reshape(-1, given.shape[-1]), 0, rows, out=kept[into])
            if self._weights is not None and weights is not None:
                self._weights[into] = weights[rows]
            self._filled = into.stop

    def flush(self) -> None:
        rows = slice(0, self._filled)
        self._filled = 0
        weights = None if self._weights is None else self._weights[rows]
        self._update(*(kept[rows] for kept in self._rows), weights=weights)

    def _update(self, *rows: Tensor, weights: Tensor | None) -> None:
        if weights is None:  # what normalisations are measured with knows none
            self.accumulator.update(*rows)
        else:
            self.accumulator.update(*rows, weights=weights)

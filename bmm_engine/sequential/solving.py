"""The solve of all modules that read one input, from what was measured there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bmm_engine.architecture import LinearModule
from bmm_engine.checkpoint import TensorSource
from bmm_engine.drift import (
    DriftAccumulator,
    DriftFactor,
    InputRecord,
    drift_energy,
    drift_task_weights,
    relative_residuals,
)
from bmm_engine.inputs import Inputs
from bmm_engine.plan import MergePlan
from bmm_engine.stream import ModuleRecord


@dataclass(frozen=True)
class Solved:
    """Tensors by the base's names, as its files hold them but for the dtype; and the records."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[InputRecord] = field(default_factory=list)
    modules: list[ModuleRecord] = field(default_factory=list)


class ModuleSolver:
    """Solves a plan's linear modules against an anchor's tensors (float32 or wider, by the base's names)."""

    def __init__(self, plan: MergePlan, inputs: Inputs, anchor: TensorSource, *, fit_bias: bool):
        self.settings, self.inputs, self.anchor, self.fit_bias = plan.settings, inputs, anchor, fit_bias
        self._alphas = {m.name: group.alpha for group in plan.groups for m in group.members}
        self._merged = set(plan.alignment.merged)

    def with_bias(self, module: LinearModule) -> bool:
        return self.fit_bias and module.has_bias and module.bias in self._merged

    def solve(self, stage: str, modules: Sequence[LinearModule], measured: Sequence[DriftAccumulator], out: Solved) -> None:
        """Solve `modules`, which read the input that was `measured` for each expert (in the inputs' order), into `out`."""
        parts: dict[tuple[float, bool], list[LinearModule]] = {}
        for module in modules:
            parts.setdefault((self._alphas[module.name], self.with_bias(module)), []).append(module)
        for (alpha, with_bias), members in parts.items():
            self._solve_part(stage, members, measured, alpha, with_bias, out)

    def _solve_part(
        self,
        stage: str,
        members: Sequence[LinearModule],
        measured: Sequence[DriftAccumulator],
        alpha: float,
        with_bias: bool,
        out: Solved,
    ) -> None:
        inputs, name = self.inputs, members[0].name
        moments = [own.moments(with_bias=with_bias) for own in measured]
        energies = [drift_energy(own, self._task_vectors(t, members, with_bias)) for t, own in enumerate(moments)]
        betas = drift_task_weights(self._given_weights(), energies, len(moments), name)
        factor = DriftFactor.of(moments, betas, alpha=alpha, name=name)
        before, after = ([0.0] * len(moments) for _ in range(2))
        listed = tuple(self._listed(betas))
        for module in members:
            anchor = inputs.oriented(self.anchor, module, with_bias)
            base = self._base(module, with_bias)
            solved, *misfits = factor.solve(anchor, self._experts(module, with_bias))
            for total, own in zip((before, after), misfits, strict=True):
                total[:] = [a + b for a, b in zip(total, own, strict=True)]
            moved = float((anchor - base).norm())
            shift = float((solved - anchor).norm()) / moved if moved else 0.0
            shape = (module.out_features, module.in_features)
            out.modules.append(ModuleRecord(module.name, shape, factor.ridge, factor.jitter, listed, shift))
            scale = self.settings.scale_setting.at(module.weight, inputs.depth(module.weight), len(moments))
            self._put(module, solved if scale == 1 else base + scale * (solved - base), with_bias, out)
        residuals = (tuple(self._listed(relative_residuals(total, energies))) for total in (before, after))
        names = tuple(m.name for m in members)
        out.inputs.append(InputRecord(stage, names, alpha, factor.ridge, factor.jitter, listed, *residuals))

    def _base(self, module: LinearModule, with_bias: bool) -> Tensor:
        return self.inputs.oriented(self.inputs.base, module, with_bias)

    def _experts(self, module: LinearModule, with_bias: bool) -> list[Tensor]:
        return [self.inputs.oriented(expert, module, with_bias) for expert in self.inputs.experts]

    def _task_vectors(self, t: int, members: Sequence[LinearModule], with_bias: bool) -> Iterator[Tensor]:
        for module in members:
            yield self.inputs.oriented(self.inputs.experts[t], module, with_bias) - self._base(module, with_bias)

    def _given_weights(self) -> str | tuple[float, ...]:
        given = self.settings.task_weights
        return given if isinstance(given, str) else self.inputs.ordered(given)

    def _listed(self, values: Sequence) -> list:
        """From the order of the inputs to that in which the experts were given."""
        listed = dict(zip(self.inputs.order, values, strict=True))
        return [listed[t] for t in range(len(listed))]

    def _put(self, module: LinearModule, merged: Tensor, with_bias: bool, out: Solved) -> None:
        weight = merged[:, :-1] if with_bias else merged
        out.tensors[module.weight] = (weight.mT if module.transposed else weight).contiguous()
        if with_bias:
            out.tensors[module.bias] = merged[:, -1].contiguous()


def accumulators(count: int, width: int, name: str, dtype: torch.dtype, device: torch.device) -> list[DriftAccumulator]:
    """One for each of `count` experts, in float32, or float64 for a walk in float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [DriftAccumulator(width, name=name, dtype=wide, device=device) for _ in range(count)]

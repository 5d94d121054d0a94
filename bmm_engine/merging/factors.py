"""What all trials of a search share: one decomposition for each group of modules, and its product with each anchor's residual.

    W*(lam) = W_a + B_a diag(1 / (e + lam)) Q^T,   A_0 = Q diag(e) Q^T,   B_a = R_a Q          (see `spectral.py`)

Q and e depend on the task weights, B on the anchor too. A trial is then one scaled product for each module whose values changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bmm_engine.merging.groups import OpenGroup
from bmm_engine.merging.inputs import Inputs
from bmm_engine.merging.plan import MergePlan
from bmm_engine.models.architecture import LinearModule
from bmm_engine.solving.filters import PLAIN, Filter
from bmm_engine.solving.moments import alignment
from bmm_engine.solving.solve import overshot
from bmm_engine.solving.spectral import SpectralPath, decompose


@dataclass(frozen=True)
class FactorGroup:
    """Modules that share an input, and what is not a tensor of their factors: for each way of task weights the trace of A_0 and the weights
    themselves. `prior`: how far the ridge pulls, W_0 + prior (W_a - W_0). `alignment`: module -> task's index -> cos_F(G_t, U_t^T U_t), where Grams
    are measured."""

    members: tuple[LinearModule, ...]
    with_bias: bool
    prior: float = 1.0
    traces: dict[str, float] = field(default_factory=dict)
    alignment: dict[str, list[float]] = field(default_factory=dict)


class FactorMaker:
    """Decomposes the groups of a plan, one at a time.

    `anchors`: label -> tensors of the anchor's whole merge by the base's names, float32. `weightings`: label -> task weights as in
    `MergeSettings`.
    """

    def __init__(
        self,
        plan: MergePlan,
        anchors: Mapping[str, Mapping[str, Tensor]],
        weightings: Mapping[str, str | tuple[float, ...]],
    ):
        self.plan, self.anchors, self.weightings = plan, anchors, weightings
        self.inputs = Inputs(plan)

    def group(self, index: int) -> tuple[FactorGroup, dict[str, Tensor]]:
        """The factors of the plan's group `index`: see `Factors` for the tensors' names."""
        planned = self.plan.groups[index]
        opened = OpenGroup(self.inputs, planned)
        prior = self.plan.settings.prior
        found = FactorGroup(planned.members, planned.with_bias, prior)
        tensors: dict[str, Tensor] = {}
        weights = {m.name: opened.weights(m) for m in planned.members}
        for label, rule in self.weightings.items():
            spectrum = decompose(
                opened.moments, opened.task_weights(rule), name=planned.name, device=self.inputs.device
            )
            found.traces[label] = spectrum.trace
            tensors[f"q {label} {planned.name}"] = spectrum.eigenvectors.to(torch.float32).mT.contiguous()
            tensors[f"e {label} {planned.name}"] = spectrum.eigenvalues
            for module in planned.members:
                base, experts = weights[module.name]
                for anchor in self.anchors:
                    weight = overshot(self._anchor(anchor, module, planned.with_bias), base, prior)
                    tensors[f"b {label} {anchor} {module.name}"] = spectrum.project(weight, experts, opened.moments)
        if self.plan.settings.gram_source != "task_vectors" and not planned.with_bias:
            for module in planned.members:
                base, experts = weights[module.name]
                cosines = [alignment(m, e - base) for m, e in zip(opened.moments, experts, strict=True)]
                found.alignment[module.name] = list(self.inputs.listed(cosines))
        return found, {name: tensor.cpu() for name, tensor in tensors.items()}

    def _anchor(self, label: str, module: LinearModule, with_bias: bool) -> Tensor:
        """The anchor's weight (out, in), or [W | b]."""
        tensors = self.anchors[label]
        return oriented(tensors, module, with_bias).to(self.inputs.device, self.inputs.dtype)


def oriented(tensors: Mapping[str, Tensor], module: LinearModule, with_bias: bool) -> Tensor:
    """A module's weight out of tensors as files hold them: (out, in), or [W | b] (out, in + 1)."""
    weight = tensors[module.weight]
    weight = weight.mT.contiguous() if module.transposed else weight
    return torch.cat([weight, tensors[module.bias][:, None]], 1) if with_bias else weight


class Factors:
    """The factors of all groups, with the anchors' tensors, by name:

    `q WEIGHTING GROUP` Q^T (in, in), `e WEIGHTING GROUP` (in,), `b WEIGHTING ANCHOR MODULE` B (out, in), `a ANCHOR TENSOR` as the base's file has it,
    `w TENSOR` the base's, for scales and priors other than 1. All float32 but e.
    """

    def __init__(self, groups: Sequence[FactorGroup], tensors: Mapping[str, Tensor], filter: Filter = PLAIN):
        self.groups, self.tensors = tuple(groups), tensors
        self.filter = filter
        self._group = {module.name: group for group in groups for module in group.members}
        self._anchors: dict[str, dict[str, Tensor]] = {}
        self._base = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w ")}
        for name, tensor in tensors.items():
            if name.startswith("a "):
                _, label, own = name.split(" ", 2)
                self._anchors.setdefault(label, {})[own] = tensor

    def anchor(self, label: str) -> Mapping[str, Tensor]:
        """All tensors of an anchor's merge, by the base's names."""
        return self._anchors[label]

    @torch.no_grad()
    def solve(
        self, module: LinearModule, weighting: str, anchor: str, alpha: float, scale: float, out: Mapping[str, Tensor]
    ) -> None:
        """Write one module's merged weight (and bias, where they are solved together) into `out`, tensors as the base's file has them.

        `alpha` inf is the anchor's own weight, whatever the scale, as in a merge.
        """
        group = self._group[module.name]
        if alpha == math.inf:
            for name in (module.weight, module.bias) if group.with_bias else (module.weight,):
                out[name].copy_(self._anchors[anchor][name])
            return
        first = group.members[0].name
        given = scale == 1 and group.prior == 1
        base = None if given else oriented(self._base, module, group.with_bias)
        start = oriented(self._anchors[anchor], module, group.with_bias)
        path = SpectralPath(
            start if base is None else overshot(start, base, group.prior),
            self.tensors[f"b {weighting} {anchor} {module.name}"],
            self.tensors[f"q {weighting} {first}"].mT,
            self.tensors[f"e {weighting} {first}"],
            group.traces[weighting],
            (),
        )
        target = out[module.weight].mT if module.transposed else out[module.weight]
        solve = partial(
            path.solve,
            alpha=alpha,
            filter=self.filter.kind,
            directions=self.filter.directions,
            scale=scale,
            base=base,
        )
        if not group.with_bias:
            solve(out=target)
            return
        solved = solve()
        target.copy_(solved[:, :-1])
        out[module.bias].copy_(solved[:, -1])


def modules_of(groups: Sequence[FactorGroup]) -> list[LinearModule]:
    return [module for group in groups for module in group.members]


def plain_alignment(groups: Sequence[FactorGroup], tasks: Sequence[str]) -> dict[str, Any]:
    """module -> task -> cosine, as JSON holds it (a module whose task vector is zero has none)."""
    return {
        module: {task: value for task, value in zip(tasks, values, strict=True) if math.isfinite(value)}
        for group in groups
        for module, values in group.alignment.items()
    }

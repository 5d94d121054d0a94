"""One trial: a candidate written into the live models, and their scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bmm_engine.evaluators.contract import Evaluator
from bmm_engine.evaluators.scores import Score
from bmm_engine.merging.factors import Factors, modules_of, oriented
from bmm_engine.merging.groups import OpenGroup
from bmm_engine.merging.inputs import Inputs
from bmm_engine.merging.plan import MergePlan
from bmm_engine.models.architecture import LinearModule
from bmm_engine.pipeline.live import LiveModels
from bmm_engine.searching.objective import Objective
from bmm_engine.searching.space import Candidate, SearchGroup, weighting_label
from bmm_engine.solving.filters import SpectralFactor
from bmm_engine.solving.solve import Factor, inverses, overshot, solve_with_factor


@dataclass(frozen=True)
class Outcome:
    """What a trial gave: validation scores by task, seconds (of which evaluation), and after which task it was given up, if it was."""

    scores: dict[str, Score]
    seconds: float
    evaluation_seconds: float
    pruned_after: str | None = None


@dataclass(frozen=True)
class Bar:
    """What a trial must be able to reach in a race: `best` so far, and the most that is credited to a task not yet scored (score / expert's)."""

    best: float
    credit: Mapping[str, float]
    experts: Mapping[str, float]
    order: tuple[str, ...]


class CandidateWriter(Protocol):
    """Writes candidates into the live models' tensors."""

    def write(self, candidate: Candidate) -> None:
        """Every tensor of the merge that the candidate stands for."""
        ...


class Writer:
    """Writes candidates into live tensors, only what changed since the last one."""

    def __init__(self, live: LiveModels, factors: Factors, groups: tuple[SearchGroup, ...]):
        self.live, self.factors = live, factors
        self._group = {module: group.name for group in groups for module in group.modules}
        self._modules = modules_of(factors.groups)
        self._solved = {m.weight for m in self._modules} | {
            m.bias for group in factors.groups if group.with_bias for m in group.members
        }
        self._anchor: str | None = None
        self._written: dict[str, tuple[object, ...]] = {}

    def write(self, candidate: Candidate) -> None:
        """Every tensor of the merge that the candidate stands for."""
        parameters = self.live.parameters
        if candidate.anchor != self._anchor:
            own = self.factors.anchor(candidate.anchor)
            self.live.load({name: tensor for name, tensor in own.items() if name not in self._solved})
            self._anchor = candidate.anchor
        weighting = weighting_label(candidate.task_weights)
        changed: set[str] = set()
        for module in self._modules:
            group = self._group[module.name]
            alpha, scale = candidate.alpha[group], candidate.scale[group]
            key = (candidate.anchor, alpha) if alpha == math.inf else (candidate.anchor, weighting, alpha, scale)
            if self._written.get(module.name) != key:
                self.factors.solve(module, weighting, candidate.anchor, alpha, scale, parameters)
                self._written[module.name] = key
                changed.update((module.weight, module.bias))
        self.live.settle(changed)


class FreeWriter:
    """The same where task weights are free numbers: A changes with them, so every trial factors anew. Moments and weights stay in memory."""

    def __init__(self, plan: MergePlan, live: LiveModels, factors: Factors, groups: tuple[SearchGroup, ...]):
        self.live, self.factors, self.inputs = live, factors, Inputs(plan)
        self._group = {module: group.name for group in groups for module in group.modules}
        self._opened = [OpenGroup(self.inputs, group) for group in plan.groups]
        self._weights = [{m.name: group.weights(m) for m in group.group.members} for group in self._opened]

    @torch.no_grad()
    def write(self, candidate: Candidate) -> None:
        anchor = self.factors.anchor(candidate.anchor)
        self.live.load(anchor)
        for opened, weights in zip(self._opened, self._weights, strict=True):
            betas = opened.task_weights(candidate.task_weights)
            by_alpha: dict[float, list[LinearModule]] = {}
            for module in opened.group.members:
                by_alpha.setdefault(candidate.alpha[self._group[module.name]], []).append(module)
            for alpha, members in by_alpha.items():
                if alpha == math.inf:
                    continue
                chosen = self.inputs.settings.spectral_filter
                (factor,) = inverses([opened.moments], [betas], chosen, alpha=alpha, names=[members[0].name])
                for module in members:
                    self._solve(module, opened, weights[module.name], anchor, factor, candidate)

    def _solve(
        self,
        module: LinearModule,
        opened: OpenGroup,
        weights: tuple[Tensor, list[Tensor]],
        anchor: Mapping[str, Tensor],
        factor: Factor | SpectralFactor,
        candidate: Candidate,
    ) -> None:
        with_bias = opened.group.with_bias
        base, experts = weights
        start = oriented(anchor, module, with_bias).to(self.inputs.dtype)
        start = overshot(start, base, self.inputs.settings.prior)
        solved = solve_with_factor(start, experts, opened.moments, factor)
        scale = candidate.scale[self._group[module.name]]
        merged = solved if scale == 1 else base + scale * (solved - base)
        weight = merged[:, :-1] if with_bias else merged
        self.live.load({module.weight: weight.mT if module.transposed else weight})
        if with_bias:
            self.live.load({module.bias: merged[:, -1]})


@dataclass
class TrialRunner:
    """Runs trials on one set of live models. `tick` is called between tasks: a driver in the same process sees to its affairs there."""

    live: LiveModels
    writer: CandidateWriter
    evaluator: Evaluator
    objective: Objective
    tick: Callable[[], None] = field(default=lambda: None)

    def run(self, candidate: Candidate, bar: Bar | None = None) -> Outcome:
        """Raises what the evaluator raises, for example `DataError` where a model gives no finite logits."""
        started = time.perf_counter()
        self.writer.write(candidate)
        scores: dict[str, Score] = {}
        spent, given_up = 0.0, None
        for task in bar.order if bar is not None else self.evaluator.tasks:
            at = time.perf_counter()
            scores[task] = self.evaluator(self.live.models[task], task)
            spent += time.perf_counter() - at
            if bar is not None and len(scores) < len(bar.order) and self._hopeless(scores, bar):
                given_up = task
                break
            self.tick()
        return Outcome(scores, time.perf_counter() - started, spent, given_up)

    def _hopeless(self, scores: Mapping[str, Score], bar: Bar) -> bool:
        return optimistic(self.objective, scores, bar) < bar.best


def optimistic(objective: Objective, scores: Mapping[str, Score], bar: Bar) -> float:
    """The objective if each task not yet scored came to its credit."""
    known = {task: score.value / bar.experts[task] for task, score in scores.items()}
    return objective({task: known.get(task, bar.credit[task]) for task in bar.order})

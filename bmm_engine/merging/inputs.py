"""What a merge reads: weights in the form that rules and solves want, with what was measured on them, in an order of the experts' contents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from bmm_engine.anchors import DepthMap
from bmm_engine.checkpoint.dtypes import float_dtype
from bmm_engine.merging.belonging import fisher_name, resolve_module, sensitivity_name
from bmm_engine.merging.ordering import canonical_order
from bmm_engine.merging.plan import MergePlan
from bmm_engine.models.architecture import LinearModule
from bmm_engine.ops.lowrank import LowRank
from bmm_engine.solving.output_metric import OutputMetric, output_metrics, task_vector_metrics
from bmm_engine.solving.solve import check_finite
from bmm_engine.statistics.fingerprints import check_weight
from bmm_engine.statistics.fisher import FisherSet
from bmm_engine.statistics.grams import GramAccumulator, GramSet
from bmm_engine.statistics.sensitivity import SensitivitySet

T = TypeVar("T")


class Inputs:
    """Base and experts of a plan. Everything that belongs to experts comes in `order`."""

    def __init__(self, plan: MergePlan):
        self.plan = plan
        self.settings, self.rule = plan.settings, plan.settings.rule
        self.base = plan.alignment.base
        self.depth = DepthMap(self.base.names())
        self.device = torch.device(plan.settings.device)
        self.dtype = float_dtype(self.base.spec(n).dtype for n in plan.alignment.merged)
        self.parameters = self.rule.parameters(plan.settings.anchor_parameters)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The experts' indices as the rule gets them: by their contents where it is symmetric, so that not a bit depends on their listing."""
        experts, names = self.plan.alignment.experts, self.plan.alignment.merged
        listed = tuple(range(len(experts)))
        if self.rule.others == "first" and (host := self.plan.alignment.host):
            return (host, *(t for t in listed if t != host))
        if not self.rule.symmetric or len(experts) == 1 or not names:
            return listed
        given = self.settings.task_weights
        weights = given if isinstance(given, tuple) else (given,) * len(experts)
        own = self.parameters.at(names[0], self.depth(names[0]), len(experts))
        per_expert = [own[key] for key, setting in self.parameters.settings.items() if setting.per_expert]
        return canonical_order(
            self.base, experts, names, [(weights[t], *(value[t] for value in per_expert)) for t in listed]
        )

    @cached_property
    def experts(self) -> tuple[Any, ...]:
        return self.ordered(self.plan.alignment.experts)

    @cached_property
    def gram_sets(self) -> tuple[GramSet, ...]:
        return self.ordered(self.plan.statistics.grams)

    @cached_property
    def fishers(self) -> tuple[FisherSet, ...]:
        return self.ordered(self.plan.statistics.fishers)

    @cached_property
    def sensitivities(self) -> tuple[SensitivitySet, ...]:
        """Those that errors of outputs are weighed by."""
        return self.ordered(self.plan.statistics.sensitivities)

    @property
    def weighted(self) -> bool:
        """Do some outputs count more than others?"""
        return self.plan.statistics.output_weights != "none"

    @cached_property
    def anchor_sensitivities(self) -> tuple[SensitivitySet, ...]:
        """Those that the anchor's rule needs, if it does."""
        return self.ordered(self.plan.statistics.of_anchor) if "sensitivities" in self.settings.anchor_needs else ()

    def ordered(self, values: Sequence[T]) -> tuple[T, ...]:
        """From the order in which the experts were given to that of the inputs."""
        return tuple(values[t] for t in self.order) if values else ()

    def listed(self, values: Sequence[T]) -> tuple[T, ...]:
        """The way back."""
        listed = dict(zip(self.order, values, strict=True))
        return tuple(listed[t] for t in range(len(listed)))

    @property
    def task_weights(self) -> str | tuple[float, ...]:
        """The settings' rule, or its numbers."""
        given = self.settings.task_weights
        return given if isinstance(given, str) else self.ordered(given)

    def at(self, name: str) -> dict[str, Any]:
        """The rule's parameters for one tensor, those of the experts in their order."""
        found = self.parameters.at(name, self.depth(name), len(self.experts))
        settings = self.parameters.settings
        return {key: self.ordered(value) if settings[key].per_expert else value for key, value in found.items()}

    def load(self, source: Any, name: str, rows: slice | None = None) -> Tensor:
        tensor = source.load(name, rows).to(self.device, self.dtype)
        check_finite(tensor, f"{source.label}, tensor {name!r}")
        return tensor

    def oriented(self, source: Any, module: LinearModule, with_bias: bool) -> Tensor:
        """The weight as (out, in), or [W | b] as (out, in + 1)."""
        weight = self.load(source, module.weight)
        weight = weight.mT.contiguous() if module.transposed else weight
        return torch.cat([weight, self.load(source, module.bias)[:, None]], 1) if with_bias else weight

    def low_rank(self, expert: Any, module: LinearModule) -> LowRank | None:
        """The expert's task vector as a product, where its source knows it as one."""
        known = getattr(expert.source, "low_rank", None)
        product = known(expert.mapping[module.weight]) if known is not None else None
        return product if product is None else product.to(self.device, self.dtype)

    def fishers_at(self, name: str, rows: slice | None = None) -> list[Tensor]:
        """The Fisher information of the experts' tensors, as they are stored; none for a tensor that has none (a buffer)."""
        found: list[Tensor] = []
        for fisher, expert in zip(self.fishers, self.experts if self.fishers else (), strict=True):
            own = fisher_name(fisher, expert, name)
            if own in fisher.buffers:
                return []
            if rows is None or rows.start == 0:
                fisher.check(own, expert.load(name), expert.label, self._others(expert, name))
            found.append(fisher.get(own, rows).to(self.device, self.dtype))
        return found

    def output_metrics(
        self, modules: Sequence[LinearModule], task_vector: Callable[[int, LinearModule], Tensor | LowRank]
    ) -> list[list[OutputMetric]]:
        """Of each module, those of the experts, from their sensitivities (or task vectors) of modules that are weighed together. `task_vector`: gives
        that of an expert's weight, (out, in). Raises `MissingTensorError`, `GramMismatchError`, `ShapeMismatchError`."""
        found = []
        share, name = self.settings.sensitivity_share, modules[0].name
        for t, expert in enumerate(self.experts):
            if self.sensitivities:
                own = self.sensitivities[t]
                hybrid = self.settings.output_hybrid(own.samples)
                task_vectors = [task_vector(t, m) for m in modules] if hybrid else []
                measured = [self._sensitivity(own, expert, m) for m in modules]
                metrics = output_metrics(measured, share, name, task_vectors, hybrid)
            else:
                metrics = task_vector_metrics([task_vector(t, m) for m in modules], share, name)
            found.append(metrics)
        return [list(own) for own in zip(*found, strict=True)]

    def sensitivities_at(self, module: LinearModule) -> list[Tensor]:
        """For the anchor's rule, the experts' (out, out) of a module. Raises as `output_metrics`."""
        experts = self.experts if self.anchor_sensitivities else ()
        return [
            self._sensitivity(own, expert, module)
            for own, expert in zip(self.anchor_sensitivities, experts, strict=True)
        ]

    def _sensitivity(self, own: SensitivitySet, expert: Any, module: LinearModule) -> Tensor:
        known = sensitivity_name(own, expert, module)
        own.check(known, expert.load(module.weight), expert.label, self._others(expert, module.weight))
        return own.get(known).to(self.device)

    def check_first(self) -> None:
        """What was measured on another model shows at its first module: find out before hours of work. Raises `GramMismatchError`."""
        measured = [m for name, m in self.plan.linear.items() if name not in self.plan.unmeasured]
        if self.plan.groups:
            measured = list(self.plan.groups[0].members)
        if self.gram_sets and self.settings.gram_source != "task_vectors" and measured:
            for t in sorted(range(len(self.order)), key=self.order.__getitem__):
                for module in measured if self.plan.groups else measured[:1]:
                    self.check_fingerprint(t, module)
        if self.fishers and self.plan.alignment.merged:
            names = self.plan.alignment.merged
            self.fishers_at(min(names, key=lambda name: self.base.spec(name).nbytes))

    def check_fingerprint(self, t: int, module: LinearModule) -> None:
        """Raise `GramMismatchError` unless the Gram set of expert `t` was measured on this very weight."""
        grams, expert = self.gram_sets[t], self.experts[t]
        own = resolve_module(grams, expert, module.name)
        check_weight(
            grams.where,
            "Gram",
            module.name,
            grams.fingerprints.get(own),
            grams.weights_dtype,
            expert.load(module.weight),
            expert.label,
            self._others(expert, module.weight),
        )

    def _others(self, expert: Any, name: str) -> dict[str, Callable[[], Tensor]]:
        """What loads the same tensor of the other models, by their labels: whose measurement it may be."""
        models = [other for other in (*self.experts, self.base) if other is not expert]
        return {other.label: partial(other.load, name) for other in models}

    def total_gram(self, t: int, module: str, with_bias: bool) -> Tensor:
        """`sum x x^T` (in, in), or of [x, 1] (in + 1, in + 1), of what expert `t`'s Gram set calls `module`; read now."""
        gram: GramAccumulator = self.gram_sets[t].get(module)
        if not with_bias:
            return gram.total.to(self.device)
        augmented = gram.total.new_empty(gram.width + 1, gram.width + 1)
        augmented[:-1, :-1] = gram.total
        augmented[-1, :-1] = augmented[:-1, -1] = gram.row_sum
        augmented[-1, -1] = gram.rows
        return augmented.to(self.device)

"""One group of modules at work: its moments, its members' weights, its task weights."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from bmm_engine.merging.belonging import resolve_module
from bmm_engine.merging.inputs import Inputs
from bmm_engine.merging.plan import ModuleGroup
from bmm_engine.models.architecture import LinearModule
from bmm_engine.ops.lowrank import LowRank
from bmm_engine.solving.moments import DenseMoment, Moment, TaskVectorMoment, hybrid_moment
from bmm_engine.solving.output_metric import OutputMetric
from bmm_engine.solving.task_weights import choose_task_weights, frobenius_norm, task_energy
from bmm_engine.solving.weighted import weighted_task_energy

# A Gram up to this size stays in memory while its group is solved; a larger one is read again for each use.
KEPT_GRAM_BYTES = 64 * 2**20


class OpenGroup:
    """One group at work: its moments, and its members' weights, read when needed."""

    def __init__(self, inputs: Inputs, group: ModuleGroup):
        self.inputs = inputs
        self.group = group
        self._weights: dict[str, tuple[Tensor, list[Tensor]]] = {}
        self.moments: list[Moment] = [self._moment(t) for t in range(len(inputs.experts))]

    @cached_property
    def metrics(self) -> dict[str, list[OutputMetric]]:
        """Of each member, by expert; empty where all outputs count alike."""
        if not self.inputs.weighted:
            return {}
        found = self.inputs.output_metrics(self.group.members, self.task_vector)
        return {module.name: own for module, own in zip(self.group.members, found, strict=True)}

    def weights(self, module: LinearModule) -> tuple[Tensor, list[Tensor]]:
        """Base and experts (out, in [+ 1]); those of a single-module group are kept, since its moments may need them too."""
        if module.name in self._weights:
            return self._weights[module.name]
        inputs, with_bias = self.inputs, self.group.with_bias
        found = (
            inputs.oriented(inputs.base, module, with_bias),
            [inputs.oriented(e, module, with_bias) for e in inputs.experts],
        )
        if len(self.group.members) == 1:
            self._weights[module.name] = found
        return found

    def task_weights(self, given: str | tuple[float, ...] | None = None) -> tuple[float, ...]:
        """The group's task weights, in the inputs' order, by the rule or numbers `given`, or by the settings'."""
        inputs = self.inputs
        given = inputs.task_weights if given is None else given if isinstance(given, str) else inputs.ordered(given)
        norms = (frobenius_norm(moment, inputs.device) for moment in self.moments)
        energies = self._energies() if given == "energy" else ()
        return choose_task_weights(given, energies, norms, len(self.moments), self.group.name)

    def _energies(self) -> list[float]:
        """By expert, over all members: how much fine-tuning changed their outputs, in their metrics where there are some."""
        energies = [0.0] * len(self.moments)
        for module in self.group.members:
            base, experts = self.weights(module)
            for t, (moment, expert) in enumerate(zip(self.moments, experts, strict=True)):
                change = expert - base
                if self.metrics:
                    energies[t] += weighted_task_energy(moment, change, self.metrics[module.name][t])
                else:
                    energies[t] += task_energy(moment, change)
        return energies

    def _moment(self, t: int) -> Moment:
        settings = self.inputs.settings
        if settings.gram_source == "data":
            return self._data_moment(t)
        task_vector = self.task_vector(t, self.group.members[0])
        if settings.gram_source == "task_vectors":
            return TaskVectorMoment(task_vector, settings.normalization)
        return hybrid_moment(self._data_moment(t), task_vector, settings.hybrid_share)

    def task_vector(self, t: int, module: LinearModule) -> Tensor | LowRank:
        """Of a weight, without its bias: (out, in)."""
        product = self.inputs.low_rank(self.inputs.experts[t], module)
        if product is not None:
            return product
        base, experts = self.weights(module)
        return (experts[t] - base)[:, : module.in_features]

    def _data_moment(self, t: int) -> Moment:
        inputs, group = self.inputs, self.group
        grams = inputs.gram_sets[t]
        for module in group.members:
            inputs.check_fingerprint(t, module)
        own = resolve_module(grams, inputs.experts[t], group.name)
        width = group.width + group.with_bias

        def load() -> Tensor:
            return inputs.total_gram(t, own, group.with_bias)

        kept = load() if 4 * width * width <= KEPT_GRAM_BYTES else None
        return DenseMoment(load if kept is None else kept, grams.rows(own), width=width, module=group.name)

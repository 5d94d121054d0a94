"""Sensitivities measured anew between the sweeps of a walk, at the merged network: Gauss-Newton again, where the first step has led to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from bmm_engine.checkpoint import TensorSource
from bmm_engine.errors import ConfigError
from bmm_engine.merging.belonging import check_sensitivities
from bmm_engine.merging.plan import MergePlan
from bmm_engine.statistics.sensitivity import SensitivitySet

# The sensitivities of the merged network (its tensors by the base's names, float32 or wider) with the head, and on the data, of task t as listed.
Remeasure = Callable[[Mapping[str, Tensor], int], SensitivitySet]


def check_remeasure(plan: MergePlan, given: Remeasure | None) -> Remeasure | None:
    """What measures again after a sweep, None where the settings ask for nothing; `given`: what a recipe's models come to. Raises `ConfigError`."""
    asked = plan.settings.sequential.remeasure
    if not asked:
        return None
    if not plan.statistics.sensitivities:
        here = "outputs are weighed by task vectors" if plan.statistics.task_vectors_weigh else "outputs count alike"
        raise ConfigError(
            f"remeasure measures sensitivities again, and {here} here; give `sensitivities` (a recipe: output_weights: sensitivity), or"
            " leave it out."
        )
    measure: Remeasure | None = asked if callable(asked) else given
    if measure is None:
        raise ConfigError(
            "remeasure = True: only a recipe knows how its experts' models run; give a function (tensors, t) -> SensitivitySet."
        )
    return measure


def measured_again(plan: MergePlan, merged: TensorSource, remeasure: Remeasure) -> MergePlan:
    """The plan with the sensitivities of the merged network in the place of the experts'. Raises `ConfigError`, what `remeasure` raises,
    `MissingTensorError`, `ShapeMismatchError`."""
    alignment = plan.alignment
    found = []
    for t in range(len(alignment.experts)):
        own = remeasure({name: merged.load(name) for name in alignment.merged}, t)
        if not isinstance(own, SensitivitySet):
            raise ConfigError(f"remeasure gave a {type(own).__name__} for expert {t}; it must give a SensitivitySet.")
        found.append(replace(own, fingerprints={}))  # they are those of the merged weights, not of the expert's
    solved = [module for group in plan.groups for module in group.members]
    check_sensitivities(solved, alignment.experts, found, plan.settings)
    return replace(plan, statistics=replace(plan.statistics, sensitivities=tuple(found)))

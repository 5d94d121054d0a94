"""What is searched: the models, the anchors to choose from, and the tasks that judge a merge."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bmm_engine.anchors import DepthMap, get_anchor
from bmm_engine.anchors.contract import GRAMS
from bmm_engine.errors import ConfigError, shown
from bmm_engine.evaluators.contract import Evaluator
from bmm_engine.evaluators.function import FunctionEvaluator
from bmm_engine.evaluators.scores import Score
from bmm_engine.merging.hosting import refuse_other_network
from bmm_engine.merging.merge import merge_models
from bmm_engine.merging.output import Destination
from bmm_engine.merging.plan import MergePlan, make_plan
from bmm_engine.merging.sources import Models
from bmm_engine.pipeline.live import LiveModels, share_parameters
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.references import AnchorRecipe
from bmm_engine.recipe.sections import SearchRecipe
from bmm_engine.recipe.settings import MergeSettings
from bmm_engine.searching.objective import Objective, get_objective
from bmm_engine.searching.space import Candidate, SearchGroup, Space, common_value, module_groups, weighting_label
from bmm_engine.sequential.run import walk_models
from bmm_engine.statistics.sets import Statistics

DEFAULT_ALPHA = 0.03


class Tasks(Protocol):
    """What judges a merge. `names` in their order; an expert's score is what a merge's is measured against."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def live(self, plan: MergePlan, device: str) -> LiveModels:
        """Models of all tasks that share what is merged."""
        ...

    def evaluator(self, split: str) -> Evaluator | None:
        """Prepared to score by that split; None where there is no such data."""
        ...

    def expert_scores(self, expert: int, evaluator: Evaluator, device: str) -> dict[str, Score]:
        """What one expert scores by itself, on the tasks that are its own (all, where none is)."""
        ...


@dataclass(frozen=True)
class Problem:
    """Everything that a search needs to know of the models. `statistics`: Grams, Fisher information, and sensitivities for anchors, where they
    are measured. `anchors`: label -> (rule, parameters), the default first.

    `walk`: in the mode sequential, what a walk needs beside: calibration batches, and sensitivities unless all outputs count alike. It is called
    where a trial runs.
    """

    models: Models
    settings: MergeSettings
    statistics: Statistics
    tasks: Tasks
    search: SearchRecipe
    anchors: dict[str, tuple[str, dict[str, Any]]]
    objective: Objective | None = None  # where it is a callable that no recipe names
    walk: Callable[[], Statistics] | None = None

    @cached_property
    def plan(self) -> MergePlan:
        """All modules that a candidate may solve: the recipe's own, at any finite ridge; one by one for walks, which measure their own inputs."""
        finite, statistics = self.settings.but(alpha=DEFAULT_ALPHA), self.statistics
        if self.walk is not None and self.settings.sequential.remeasure:
            raise ConfigError(
                "a search does not measure sensitivities again between the sweeps of its trials; leave `remeasure` out."
            )
        if self.walk is not None:
            finite, statistics = finite.but(gram_source="task_vectors"), replace(statistics, grams=())
        plan = make_plan(finite, self.models, statistics)
        refuse_other_network(plan.alignment.hosted, "a search")
        if not plan.groups:
            raise ConfigError("a search needs linear modules to solve, and the recipe leaves none. See `bmm inspect`.")
        return plan

    @property
    def goal(self) -> Objective:
        """What is maximised."""
        return self.objective or get_objective(self.search.objective)

    @property
    def modules(self) -> list[str]:
        return [m.name for group in self.plan.groups for m in group.members]

    @cached_property
    def groups(self) -> tuple[SearchGroup, ...]:
        return module_groups(self.modules, self.search)

    @cached_property
    def space(self) -> Space:
        """Raises `ConfigError` for groups whose modules differ in the recipe's own values."""
        depth, linear = DepthMap(self.plan.alignment.base.names()), self.plan.linear

        def default(setting: Any, key: str) -> dict[str, float]:
            def at(module: str) -> float:
                weight = linear[module].weight
                return float(setting.at(weight, depth(weight), len(self.models.experts)))

            return {g.name: common_value(map(at, g.modules), g.name, key) for g in self.groups}

        alpha = default(self.settings.alpha_setting, "alpha")
        # A recipe that asks for the anchor alone has no ridge to start from.
        alpha = {name: DEFAULT_ALPHA if value == math.inf else value for name, value in alpha.items()}
        if self.settings.shrinkage:
            raise ConfigError(
                f"shrinkage is {self.settings.shrinkage}, but a search chooses the scales itself: leave out shrinkage."
            )
        low, high = self.search.alpha_range
        for name, value in alpha.items():
            if not low <= value <= high:
                raise ConfigError(
                    f"alpha is {value:g} for the search group {shown(name)}, outside search.alpha_range = [{low:g}, {high:g}]; change one of them."
                )
        weightings = () if self.search.weightings == "free" else tuple(self.search.weightings)
        default_weights = self.settings.task_weights
        if self.search.weightings == "free":
            default_weights = (1.0,) * len(self.models.experts)
        elif weightings:
            default_weights = weightings[0]
        return Space(
            self.groups,
            tuple(self.anchors),
            alpha,
            default(self.settings.scale_setting, "scale"),
            default_weights,
            self.search,
            weightings,
            len(self.models.experts) if self.search.weightings == "free" else 0,
        )

    @property
    def weightings(self) -> dict[str, str | tuple[float, ...]]:
        """Label -> task weights of the factors that trials need."""
        if self.space.free_tasks:
            return {}
        chosen = self.space.weightings or (self.space.default_weights,)
        return {weighting_label(rule): rule for rule in chosen}

    def anchor_tensors(self, label: str) -> dict[str, Tensor]:
        """The anchor's own merge, by the base's names, float tensors in float32."""
        rule, parameters = self.anchors[label]
        needs_grams = bool(get_anchor(rule).needs_of(parameters) & GRAMS)
        source = "data" if needs_grams and self.statistics.grams else "task_vectors"
        found = merge_models(
            self.settings.but(anchor=rule, anchor_parameters=parameters).anchor_alone(source),
            self.models,
            self.statistics if source == "data" else replace(self.statistics, grams=()),
            Destination(dtype=torch.float32),
            progress=False,
        )
        return found.tensors or {}

    def merge(self, candidate: Candidate) -> dict[str, Tensor]:
        """The merge that the candidate stands for, in memory. Raises as `merge` and `merge_sequential`."""
        settings = self.settings.but(**self.settings_of(candidate))
        if self.walk is None:
            return merge_models(settings, self.models, self.statistics, progress=False).tensors or {}
        own = self.statistics
        walked = replace(
            self.walk(), grams=own.grams, fishers=own.fishers, anchor_sensitivities=own.anchor_sensitivities
        )
        return walk_models(settings, self.models, walked, progress=False).tensors or {}

    def settings_of(self, candidate: Candidate) -> dict[str, Any]:
        """A candidate as the arguments of `merge` that it stands for: anchor, its parameters, alpha, scale, task weights."""
        rule, parameters = self.anchors[candidate.anchor]
        return {
            "anchor": rule,
            "anchor_parameters": parameters,
            "alpha": self._setting(candidate.alpha),
            "scale": self._setting(candidate.scale),
            "task_weights": candidate.task_weights,
        }

    def _setting(self, values: Mapping[str, float]) -> Any:
        """One number, or a list of {filter, value} with a filter for each module."""
        if len(set(values.values())) == 1:
            return next(iter(values.values()))
        cases = [
            {"filter": self.plan.linear[module].weight, "value": values[group.name]}
            for group in self.groups
            for module in group.modules
        ]
        # A filter takes every name that it is part of: the longer ones first.
        return sorted(cases, key=lambda case: -len(str(case["filter"])))


def anchor_choices(recipe: Recipe) -> dict[str, tuple[str, dict[str, Any]]]:
    """The anchors that a recipe's search chooses from, by label: a rule's name, with its parameters where they are given."""
    if not recipe.search.anchors:
        return {recipe.anchor.name: (recipe.anchor.name, recipe.anchor_parameters)}
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for raw in recipe.search.anchors:
        own = recipe.model_copy(
            update={"anchor": AnchorRecipe.model_validate({"name": raw} if isinstance(raw, str) else raw)}
        )
        rule, parameters = get_anchor(own.anchor.name), own.anchor.parameters
        rule.check_experts(len(recipe.experts))
        rule.parameters(parameters)
        if own.anchor.name == recipe.anchor.name and not parameters:
            parameters = recipe.anchor_parameters
        given = ",".join(f"{key}={value}" for key, value in own.anchor.parameters.items()).replace(" ", "")
        label = f"{own.anchor.name}({given})" if given else own.anchor.name
        if label in found:
            raise ConfigError(f"search.anchors: {shown(label)} is there twice; each choice must differ.")
        found[label] = (own.anchor.name, parameters)
    return found


@dataclass
class FunctionTasks:
    """Tasks judged by a callable `(model, task) -> float`, on live models in memory."""

    base: nn.Module
    experts: Sequence[nn.Module | None]
    names: tuple[str, ...]
    function: Callable[[nn.Module, str], Any]
    reference: Mapping[str, float] | None = None

    def live(self, plan: MergePlan, device: str) -> LiveModels:
        shared = share_parameters(plan.alignment, [("", None, lambda: copy.deepcopy(self.base).to(device))])
        return replace(shared, models=dict.fromkeys(self.names, shared.models[""]))

    def evaluator(self, split: str) -> Evaluator | None:
        return FunctionEvaluator(self.function, self.names, split) if split == "validation" else None

    def expert_scores(self, expert: int, evaluator: Evaluator, device: str) -> dict[str, Score]:
        """Task i is expert i's where there are as many; else all are every expert's, and the best counts."""
        names = self.names
        if len(names) == len(self.experts):
            names = (names[expert],)
        if self.reference is not None:
            return {name: Score(self.reference[name], 0, math.nan, math.nan, "given") for name in names}
        model = self.experts[expert]
        if model is None:
            raise ConfigError(
                f"expert {expert} is no live model, so it cannot be scored; give live models, or the experts' scores (`expert_scores`)."
            )
        return {name: evaluator(model, name) for name in names}


def common_tensors(problem: Problem, anchors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The part of the factors' tensors that does not come from a group: the anchors', and the base's weights where scale or prior may differ
    from 1."""
    tensors = {f"a {label} {name}": tensor for label, own in anchors.items() for name, tensor in own.items()}
    space = problem.space
    scaled = space.options.scales != "fixed" or any(value != 1 for value in space.default_scale.values())
    if scaled or problem.settings.prior != 1:
        for name in (name for group in problem.plan.groups for name in group.tensors):
            tensors[f"w {name}"] = problem.plan.alignment.base.load(name).float()
    return tensors

"""What a search varies: groups of modules, the variables of each, and candidates: one value for every variable."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from bmm_engine.errors import ConfigError
from bmm_engine.models.roles import ROLES, Layers, module_role
from bmm_engine.recipe.sections import SearchRecipe

if TYPE_CHECKING:
    import nevergrad as ng

# Values are rounded to so many digits, so that what a study records is what a trial ran, and a recipe can say it.
DIGITS = 6
# The share of one task weight in the sum may differ from another's by this factor at most.
FREE_WEIGHT_RANGE = (0.1, 10.0)


@dataclass(frozen=True)
class SearchGroup:
    """Modules that share a ridge (and a scale). `role` is "mixed" and `depth` None where they are of several."""

    name: str
    modules: tuple[str, ...]
    role: str = "mixed"
    depth: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One point of the space: the anchor's label, relative ridge (inf: the anchor itself) and scale of each group, and task weights by the
    name of a rule or as numbers."""

    anchor: str
    alpha: Mapping[str, float]
    scale: Mapping[str, float]
    task_weights: str | tuple[float, ...] = "none"

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: infinity as text."""
        return {
            "anchor": self.anchor,
            "alpha": {group: "inf" if value == math.inf else value for group, value in self.alpha.items()},
            "scale": dict(self.scale),
            "task_weights": self.task_weights if isinstance(self.task_weights, str) else list(self.task_weights),
        }

    @classmethod
    def from_plain(cls, raw: Mapping[str, Any]) -> Candidate:
        weights = raw["task_weights"]
        return cls(
            raw["anchor"],
            {group: float(value) for group, value in raw["alpha"].items()},
            {group: float(value) for group, value in raw["scale"].items()},
            weights if isinstance(weights, str) else tuple(map(float, weights)),
        )

    @property
    def key(self) -> str:
        """Equal for equal candidates."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()


def module_groups(modules: Sequence[str], options: SearchRecipe) -> tuple[SearchGroup, ...]:
    """The groups that `options.groups` makes of the solved modules, each module in one of them.

    With patterns, the first that matches takes a module. Raises `ConfigError` for a pattern that takes none, and for a module that none takes.
    """
    if isinstance(options.groups, dict):
        return _by_patterns(modules, options.groups)
    layers = Layers(modules)
    found: dict[str, list[str]] = {}
    places: dict[str, tuple[str, int | None]] = {}
    for module in modules:
        role, depth = module_role(module), layers.bin(module, options.depth_bins)
        name, place = {
            "role_depth": (f"{role}.{depth}", (role, depth)),
            "role": (role, (role, None)),
            "depth": (f"depth.{depth}", ("mixed", depth)),
            "all": ("all", ("mixed", None)),
            "module": (module, (role, layers(module))),
        }[options.groups]
        found.setdefault(name, []).append(module)
        places[name] = place
    groups = (SearchGroup(name, tuple(own), *places[name]) for name, own in found.items())
    if options.groups == "module":
        return tuple(groups)
    order = [*ROLES, "mixed"]
    return tuple(sorted(groups, key=lambda g: (order.index(g.role), -1 if g.depth is None else g.depth)))


def _by_patterns(modules: Sequence[str], patterns: Mapping[str, Sequence[str]]) -> tuple[SearchGroup, ...]:
    found: dict[str, list[str]] = {name: [] for name in patterns}
    for module in modules:
        taker = next((name for name, own in patterns.items() if any(fnmatchcase(module, p) for p in own)), None)
        if taker is None:
            raise ConfigError(
                f"search.groups: no pattern takes the module {module!r}; add a last group with the pattern '*' for the rest."
            )
        found[taker].append(module)
    for name, own in found.items():
        if not own:
            raise ConfigError(
                f"search.groups: {name!r} ({', '.join(patterns[name])}) takes no module that an earlier group leaves; the modules are called like"
                f" {modules[0]!r}."
            )
    return tuple(SearchGroup(name, tuple(own)) for name, own in found.items())


@dataclass(frozen=True)
class Space:
    """Groups, anchors to choose from, and the recipe's own values, which are the plain default.

    `anchors`: labels, the default first. `task_weights`: ways to choose from, or () for none ("free" is `free_tasks` > 0).
    """

    groups: tuple[SearchGroup, ...]
    anchors: tuple[str, ...]
    default_alpha: Mapping[str, float]
    default_scale: Mapping[str, float]
    default_weights: str | tuple[float, ...]
    options: SearchRecipe
    weightings: tuple[str, ...] = ()
    free_tasks: int = 0

    def first_candidates(self) -> list[tuple[str, Candidate]]:
        """(kind, candidate): every anchor by itself, then on each the recipe's own ridge; never worse than those is what a search returns."""
        ones = {g.name: 1.0 for g in self.groups}
        alone = {g.name: math.inf for g in self.groups}
        plain = Candidate(self.anchors[0], self.default_alpha, self.default_scale, self.default_weights)
        return [
            *(("anchor", Candidate(label, alone, ones, self.default_weights)) for label in self.anchors),
            *(("default", replace(plain, anchor=label)) for label in self.anchors),
        ]

    # The same as Nevergrad sees it

    def parametrization(self) -> ng.p.Dict:
        """A scalar for each logarithm and scale, a choice for each list."""
        import nevergrad as ng

        low, high = (math.log10(v) for v in self.options.alpha_range)
        variables: dict[str, ng.p.Parameter] = {}
        for group in self.groups:
            start = _clamp(math.log10(self.default_alpha[group.name]), low, high)
            variables[f"alpha {group.name}"] = ng.p.Scalar(init=start, lower=low, upper=high)
        bottom, top = self.options.scale_range
        for name in self._scale_variables():
            start = self.default_scale[name or self.groups[0].name]
            variables[f"scale {name}"] = ng.p.Scalar(init=_clamp(start, bottom, top), lower=bottom, upper=top)
        if len(self.anchors) > 1:
            variables["anchor"] = ng.p.Choice(list(self.anchors), deterministic=True)
        if len(self.weightings) > 1:
            variables["task_weights"] = ng.p.Choice(list(self.weightings), deterministic=True)
        bounds = [math.log10(v) for v in FREE_WEIGHT_RANGE]
        for task in range(self.free_tasks):
            variables[f"weight {task}"] = ng.p.Scalar(init=0.0, lower=bounds[0], upper=bounds[1])
        return ng.p.Dict(**variables)

    def decode(self, values: Mapping[str, Any]) -> Candidate:
        """The candidate of a point of the parametrization."""
        top = self.options.alpha_range[1]
        alpha = {g.name: _rounded(10 ** values[f"alpha {g.name}"]) for g in self.groups}
        alpha = {name: math.inf if value >= top else value for name, value in alpha.items()}
        if self.options.scales == "fixed":
            scale: Mapping[str, float] = self.default_scale
        else:
            common = self.options.scales == "global"
            scale = {g.name: _rounded(values[f"scale {'' if common else g.name}"]) for g in self.groups}
        weights: str | tuple[float, ...] = values.get("task_weights", self.default_weights)
        if self.free_tasks:
            raw = [10 ** values[f"weight {task}"] for task in range(self.free_tasks)]
            mean = sum(raw) / len(raw)
            weights = tuple(_rounded(value / mean) for value in raw)
        return Candidate(values.get("anchor", self.anchors[0]), alpha, scale, weights)

    def encode(self, candidate: Candidate) -> dict[str, Any]:
        """The point of the parametrization that is, or is nearest to, a candidate."""
        low, high = (math.log10(v) for v in self.options.alpha_range)
        values: dict[str, Any] = {}
        for group in self.groups:
            alpha = candidate.alpha[group.name]
            values[f"alpha {group.name}"] = high if alpha == math.inf else _clamp(math.log10(alpha), low, high)
        for name in self._scale_variables():
            values[f"scale {name}"] = _clamp(candidate.scale[name or self.groups[0].name], *self.options.scale_range)
        if len(self.anchors) > 1:
            values["anchor"] = candidate.anchor
        if len(self.weightings) > 1:
            values["task_weights"] = candidate.task_weights
        for task in range(self.free_tasks):
            weight = 1.0 if isinstance(candidate.task_weights, str) else candidate.task_weights[task]
            values[f"weight {task}"] = _clamp(math.log10(weight), *(math.log10(v) for v in FREE_WEIGHT_RANGE))
        return values

    def _scale_variables(self) -> list[str]:
        if self.options.scales == "fixed":
            return []
        return [""] if self.options.scales == "global" else [g.name for g in self.groups]


def weighting_label(rule: str | Sequence[float]) -> str:
    """How factors name a way of task weights."""
    return rule if isinstance(rule, str) else "given"


def common_value(values: Iterable[float], group: str, key: str) -> float:
    """The one value that a group's modules have. Raises `ConfigError` if they have several."""
    found = sorted(set(values))
    if len(found) > 1:
        raise ConfigError(
            f"{key} is {found[0]:g} for some modules of the search group {group!r} and {found[1]:g} for others; give one value for all of a group, or"
            " choose other search.groups."
        )
    return found[0]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)

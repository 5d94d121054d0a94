"""What a merge will do, decided from names, shapes and headers alone: which modules are solved, what comes from the anchor, what is copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from bmm_engine.anchors import DepthMap
from bmm_engine.anchors.contract import GRAMS
from bmm_engine.checkpoint.compose import root_checkpoint
from bmm_engine.errors import CheckpointError, ConfigError, GramMismatchError, listed
from bmm_engine.merging.accounting import check_architecture, check_configs, check_rows
from bmm_engine.merging.align import AlignedExpert, Alignment, align
from bmm_engine.merging.belonging import (
    check_fishers,
    check_sensitivities,
    find_module,
    measured_modules,
    resolve_module,
)
from bmm_engine.merging.hosting import host_of, refuse_other_network
from bmm_engine.merging.outcomes import left_in_layers, unsolved
from bmm_engine.merging.sources import Models
from bmm_engine.merging.stacks import check_stacks
from bmm_engine.models.architecture import (
    LinearModule,
    checkpoint_linear_modules,
    linear_modules,
    matrix_modules,
    select_modules,
    weight_patterns,
)
from bmm_engine.models.bounds import Held
from bmm_engine.models.building import UnknownArchitectureError, meta_model
from bmm_engine.recipe.settings import MergeSettings
from bmm_engine.solving.weighted import check_filter
from bmm_engine.statistics.grams import GramSet
from bmm_engine.statistics.sequential_grams import check_sequential
from bmm_engine.statistics.sets import Statistics


@dataclass(frozen=True)
class ModuleGroup:
    """Modules that share their input and ridge, so one Gram, one factor. With `fit_bias`, all of them have a bias or none has."""

    members: tuple[LinearModule, ...]
    width: int
    alpha: float
    with_bias: bool = False

    @property
    def name(self) -> str:
        return self.members[0].name

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(t for m in self.members for t in ((m.weight, m.bias) if self.with_bias else (m.weight,)))


@dataclass(frozen=True)
class MergePlan:
    """`groups` are solved; `from_anchor` and `from_base` name the other tensors; `unmeasured` are linear modules that no Gram covers."""

    alignment: Alignment
    settings: MergeSettings
    groups: tuple[ModuleGroup, ...]
    from_anchor: tuple[str, ...]
    unmeasured: tuple[str, ...]
    linear: dict[str, LinearModule]
    statistics: Statistics

    @property
    def from_base(self) -> tuple[str, ...]:
        return self.alignment.kept

    @property
    def solved(self) -> frozenset[str]:
        """Names of the tensors that are solved."""
        return frozenset(t for g in self.groups for t in g.tensors)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What whoever merges should know: heads that became the output's own, what an expert loses, linear weights that are not solved although all
        should be."""
        notes = [*self.alignment.notes, *left_in_layers(self.alignment)]
        if self.settings.solves and self.settings.modules is None:
            meant = (m.weight for name, m in self.linear.items() if name not in self.unmeasured)
            notes += filter(None, [unsolved(self.alignment, self.solved, meant)])
        return tuple(notes)

    def check_statistics(self) -> None:
        """Raise `ConfigError` or `GramMismatchError` unless what the anchor needs beside the weights is there, and is of its kind."""
        settings, rule, count = self.settings, self.settings.rule, len(self.alignment.experts)
        fishers, gram_sets, needs = self.statistics.fishers, self.statistics.grams, self.settings.anchor_needs
        if "fishers" in needs and len(fishers) != count:
            raise ConfigError(
                f"anchor {rule.name!r} needs the Fisher information of every expert: {len(fishers)} given for {count} experts. Measure it"
                " (`bmm collect --fisher`, or `collect_fisher`) and list one file for each, in the same order."
            )
        if "sensitivities" in needs and len(self.statistics.of_anchor) != count:
            raise ConfigError(
                f"anchor {rule.name!r} needs the sensitivities of every expert: {len(self.statistics.of_anchor)} given for {count} experts. Measure"
                " them (`bmm collect --sensitivity`, or `collect_sensitivity`) and list one file for each, in the same order."
            )
        if needs & GRAMS and settings.gram_source == "task_vectors":
            raise ConfigError(
                f"anchor {rule.name!r} needs measured Grams: give `calibration` or `grams` for every expert, or take an anchor that"
                " reads weights alone, such as 'tsv_m' or 'wudi'."
            )
        if "sequential_grams" in needs:
            check_sequential(gram_sets, rule.name, settings.anchor_parameters)
        elif sequential := [g for g in gram_sets if g.kind != "expert"]:
            raise GramMismatchError(
                f"{sequential[0].where}: its Grams are of the kind {sequential[0].kind!r}, measured while experts were merged; only the anchor"
                f" {sequential[0].settings.get('rule')!r} takes them. Collect plain ones with `bmm collect`."
            )

    @property
    def module_count(self) -> int:
        return sum(len(g.members) for g in self.groups)


def make_plan(settings: MergeSettings, models: Models, statistics: Statistics) -> MergePlan:
    """Line up the models, find their linear modules, and group them; from headers alone. Raises as `merge` does."""
    if not settings.unchecked_configs:
        check_stacks((models.base, *models.experts))
    host = host_of(settings, models.experts)
    alignment = align(models.base, models.experts, settings.keep_base, settings.vocabulary, models.live, host)
    if settings.mode == "sequential":
        refuse_other_network(alignment.hosted, "mode sequential")
    check_configs(alignment, unchecked=settings.unchecked_configs, vocabulary=settings.vocabulary)
    check_architecture(alignment, settings)
    check_rows(alignment, settings)
    # The anchor alone needs to know the modules only if it treats matrices in a way of their own, or they are calibrated.
    linear = {}
    if settings.solves or settings.rule.linear or settings.calibrate:
        linear = find_linear_modules(alignment, alignment.live, settings.modules, statistics.grams)
    if settings.solves and not linear and _has_linear_modules(alignment, alignment.live):
        raise ConfigError(
            "nothing can be solved: the model has linear modules, but none of the tensors to be merged is known as the weight of one. Name them with"
            " `modules` (patterns of module names, as in the base's files), take fewer into `keep_base`, or say `alpha: inf` for the anchor's own"
            " merge of all tensors."
        )
    return _build_plan(alignment, linear, settings, statistics)


def _has_linear_modules(alignment: Alignment, live: nn.Module | None) -> bool:
    """Beside heads. A network of convolutions has none: then there is nothing to miss."""
    root = root_checkpoint(alignment.base)
    if live is None and root is not None and root.config is not None:
        live = meta_model(root.path, Held.of(root.shapes()))
    return live is None or bool(linear_modules(live))


def find_linear_modules(
    alignment: Alignment, model: nn.Module | None, modules: Sequence[str] | None, gram_sets: Sequence[GramSet] = ()
) -> dict[str, LinearModule]:
    """The linear modules among the merged tensors: of a live `model`, of the base checkpoint's architecture, or as the Grams name them."""
    base = alignment.base
    merged = set(alignment.merged)
    stored = {n: base.spec(n).shape for n in alignment.merged}
    unknown: CheckpointError | None = None
    if model is not None:
        return _merged(linear_modules(model, modules), merged)
    root = root_checkpoint(base)
    if root is not None and base.config is not None:
        # What a view (stacked layers, another vocabulary) says otherwise than the file.
        overrides = {key: value for key, value in base.config.items() if value != (root.config or {}).get(key)}
        try:
            held = Held.of({n: base.spec(n).shape for n in base.names()})
            return _merged(checkpoint_linear_modules(root.path, stored, modules, overrides, held), merged)
        except (
            UnknownArchitectureError
        ) as error:  # not an architecture of transformers: the Grams or the patterns may still name the modules
            unknown = error
    if gram_sets:
        named = [_modules_of(g, e, stored) for g, e in zip(gram_sets, alignment.experts, strict=False)]
        known = {name: module for own in reversed(named) for name, module in own.items()}
        if not known:
            raise gram_sets[0].unknown(
                next((n for n in alignment.merged if n.endswith(".weight")), "").removesuffix(".weight")
            )
        return _merged(
            select_modules({n: known[n] for w in stored if (n := w.removesuffix(".weight")) in known}, modules), merged
        )
    if modules is not None:
        return _merged(matrix_modules(stored, modules), merged)
    if unknown is not None:
        raise UnknownArchitectureError(
            f"{unknown} Of these files: modules: [{_quoted(weight_patterns(stored))}]."
        ) from unknown
    raise ConfigError(
        f"{base.label}: which of its tensors are linear modules cannot be told (no config.json, no Grams). Name them with `modules`, for"
        " example ['*attention*', '*mlp*'], or pass live models."
    )


def _quoted(patterns: Sequence[str]) -> str:
    return listed(map(repr, patterns[:4]))


def _merged(found: dict[str, LinearModule], merged: set[str]) -> dict[str, LinearModule]:
    return {name: m for name, m in found.items() if m.weight in merged}


def _build_plan(
    alignment: Alignment, linear: dict[str, LinearModule], settings: MergeSettings, statistics: Statistics
) -> MergePlan:
    """Group the modules, once every set of statistics is known to be its expert's by names and shapes. Raises `GramMismatchError`, `ConfigError`,
    `MissingTensorError`, `ShapeMismatchError`."""
    experts, gram_sets, sensitivities = alignment.experts, statistics.grams, statistics.sensitivities
    settings.rule.check_experts(len(experts))
    uses_data = settings.gram_source in ("data", "hybrid") and settings.needs_grams
    if not isinstance(settings.task_weights, str) and len(settings.task_weights) != len(experts):
        raise ConfigError(
            f"task_weights has {len(settings.task_weights)} numbers for {len(experts)} experts; give one for each."
        )
    if uses_data and len(gram_sets) != len(experts):
        raise ConfigError(
            f"{len(gram_sets)} Gram sets for {len(experts)} experts; give one for each, in the same order (see `bmm collect`)."
        )
    if sensitivities and len(sensitivities) != len(experts):
        raise ConfigError(
            f"{len(experts)} experts and {len(sensitivities)} sensitivities; give one for each expert, in the same order, or none."
        )
    measured = measured_modules(linear, experts, gram_sets, settings) if uses_data else dict(linear)
    unmeasured = [name for name in linear if name not in measured]
    depth = DepthMap(alignment.base.names())
    alphas = {name: settings.alpha_setting.at(m.weight, depth(m.weight), len(experts)) for name, m in measured.items()}
    solved = {name: m for name, m in measured.items() if alphas[name] != math.inf}
    if "fishers" in settings.anchor_needs and len(statistics.fishers) == len(experts):
        check_fishers(alignment.merged, experts, statistics.fishers, settings)
    if solved and statistics.output_weights != "none":
        check_filter(settings.spectral_filter)
    if sensitivities:
        check_sensitivities(solved.values(), experts, sensitivities, settings)
    if "sensitivities" in settings.anchor_needs and len(statistics.of_anchor) == len(experts):
        check_sensitivities(measured.values(), experts, statistics.of_anchor, settings)
    groups = _groups(solved, alphas, settings, gram_sets, experts, set(alignment.merged))
    taken = {t for g in groups for t in g.tensors}
    from_anchor = tuple(n for n in alignment.merged if n not in taken)
    return MergePlan(alignment, settings, groups, from_anchor, tuple(unmeasured), linear, statistics)


def _groups(
    solved: dict[str, LinearModule],
    alphas: dict[str, float],
    settings: MergeSettings,
    gram_sets: Sequence[GramSet],
    experts: Sequence[AlignedExpert],
    merged: set[str],
) -> tuple[ModuleGroup, ...]:
    # The data-free Gram is each module's own (U^T U), so only measured Grams are shared, and only where every expert's are.
    members: dict[tuple[Any, ...], list[LinearModule]] = {}
    for name, module in solved.items():
        with_bias = settings.fit_bias and settings.gram_source == "data" and module.bias in merged
        if settings.gram_source == "data":
            shared = tuple(g.group(resolve_module(g, e, name)) for g, e in zip(gram_sets, experts, strict=True))
            members.setdefault((shared, alphas[name], with_bias), []).append(module)
        else:
            members[(name, alphas[name], with_bias)] = [module]
    return tuple(ModuleGroup(tuple(own), own[0].in_features, *key[1:]) for key, own in members.items())


def _modules_of(grams: GramSet, expert: AlignedExpert, stored: dict[str, tuple[int, ...]]) -> dict[str, LinearModule]:
    found = {}
    for weight, shape in stored.items():
        name = weight.removesuffix(".weight")
        own = find_module(grams, expert, name) if weight.endswith(".weight") and len(shape) == 2 else None
        if own is not None:
            transposed = own in grams.transposed
            out_features, in_features = shape[::-1] if transposed else shape
            found[name] = LinearModule(name, out_features, in_features, transposed, f"{name}.bias" in stored)
    return found

"""What a merge will do, decided from names, shapes and headers alone: which modules are solved, what comes from the anchor, what is copied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bmm_engine.align import AlignedExpert, Alignment
from bmm_engine.anchors import Anchor, get_anchor
from bmm_engine.architecture import (
    LinearModule,
    checkpoint_linear_modules,
    linear_modules,
    matrix_modules,
    select_modules,
)
from bmm_engine.checkpoint import Checkpoint
from bmm_engine.errors import CheckpointError, ConfigError, GramMismatchError
from bmm_engine.grams import GramSet


@dataclass(frozen=True)
class MergeSettings:
    """How to merge; every field as in `merge`."""

    anchor: str = "average"
    anchor_parameters: dict[str, Any] | None = None
    gram_source: str = "task_vectors"  # "data" | "task_vectors" | "hybrid"
    hybrid_share: float = 0.5
    normalization: str = "trace"
    alpha: float = 0.03
    scale: float = 1.0
    task_weights: str | tuple[float, ...] = "none"
    fit_bias: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.gram_source not in ("data", "task_vectors", "hybrid"):
            raise ConfigError(f"gram_source must be 'data', 'task_vectors' or 'hybrid', not {self.gram_source!r}.")
        if not self.alpha >= 0:
            raise ConfigError(f"alpha must be >= 0 (inf for the anchor itself), not {self.alpha}.")
        if not math.isfinite(self.scale):
            raise ConfigError(f"scale must be finite, not {self.scale}.")
        if isinstance(self.task_weights, str) and self.task_weights not in ("none", "energy"):
            raise ConfigError(
                f"task_weights must be 'none', 'energy' or one number per expert, not {self.task_weights!r}."
            )
        if self.fit_bias and self.gram_source != "data":
            raise ConfigError(
                f"fit_bias needs the mean of the inputs, so gram_source 'data', not {self.gram_source!r}."
            )
        self.rule.parameters(self.anchor_parameters)

    @property
    def rule(self) -> Anchor:
        return get_anchor(self.anchor)


@dataclass(frozen=True)
class ModuleGroup:
    """Modules that share their input, so one Gram, one factor. With `fit_bias`, all of them have a bias or none has."""

    members: tuple[LinearModule, ...]
    width: int
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
    gram_sets: tuple[GramSet, ...]

    @property
    def from_base(self) -> tuple[str, ...]:
        return self.alignment.kept

    @property
    def module_count(self) -> int:
        return sum(len(g.members) for g in self.groups)


def find_linear_modules(
    alignment: Alignment, model: Any, modules: Iterable[str] | None, gram_sets: Sequence[GramSet]
) -> dict[str, LinearModule]:
    """The linear modules among the merged tensors: of a live `model`, of the base checkpoint's architecture, or as the Grams name them."""
    base = alignment.base
    merged = set(alignment.merged)
    stored = {n: base.spec(n).shape for n in alignment.merged}
    unknown: CheckpointError | None = None
    if isinstance(model, nn.Module):
        return _merged(linear_modules(model, modules), merged)
    if isinstance(base, Checkpoint) and base.config is not None:
        try:
            return _merged(checkpoint_linear_modules(base.path, stored, modules), merged)
        except (
            CheckpointError
        ) as error:  # not an architecture of transformers: the Grams or the patterns may still name the modules
            unknown = error
    if gram_sets:
        return _merged(select_modules(_modules_of(gram_sets[0], alignment.experts[0], stored), modules), merged)
    if modules is not None:
        return _merged(matrix_modules(stored, modules), merged)
    raise unknown or ConfigError(
        f"{base.label}: which of its tensors are linear modules cannot be told (no config.json, no Grams). Name them with `modules`, for"
        " example ['*attention*', '*mlp*'], or pass live models."
    )


def _merged(found: dict[str, LinearModule], merged: set[str]) -> dict[str, LinearModule]:
    return {name: m for name, m in found.items() if m.weight in merged}


def build_plan(
    alignment: Alignment,
    linear: dict[str, LinearModule],
    settings: MergeSettings,
    gram_sets: Sequence[GramSet],
    explicit: bool,
) -> MergePlan:
    """Group the modules and check every Gram's width. `explicit`: the user named the modules, so a missing Gram is an error.

    Raises `GramMismatchError`, `ConfigError`.
    """
    experts = alignment.experts
    uses_data = settings.gram_source in ("data", "hybrid") and settings.alpha != math.inf
    if not isinstance(settings.task_weights, str) and len(settings.task_weights) != len(experts):
        raise ConfigError(
            f"task_weights has {len(settings.task_weights)} numbers for {len(experts)} experts; give one for each."
        )
    if uses_data and len(gram_sets) != len(experts):
        raise ConfigError(
            f"{len(gram_sets)} Gram sets for {len(experts)} experts; give one for each, in the same order (see `bmm collect`)."
        )
    unmeasured: list[str] = []
    solved = dict(linear) if settings.alpha != math.inf else {}
    if uses_data:
        for name in linear:
            lacking = [g for g, e in zip(gram_sets, experts, strict=True) if _find(g, e, name) is None]
            if lacking and explicit:
                lacking[0].group(name)  # raises, with the names it has
            if lacking:
                unmeasured.append(name)
                del solved[name]
        if not solved and linear:
            gram_sets[0].group(next(iter(linear)))
        for name, module in solved.items():
            for grams, expert in zip(gram_sets, experts, strict=True):
                width = grams.width(resolve_module(grams, expert, name))
                if width != module.in_features:
                    raise GramMismatchError(
                        f"{grams.where}: the Gram of {name!r} has width {width}, the module reads {module.in_features} features. It was measured"
                        " on another model; collect it again from this expert."
                    )
    groups = _groups(solved, settings, gram_sets, experts, set(alignment.merged))
    taken = {t for g in groups for t in g.tensors}
    from_anchor = tuple(n for n in alignment.merged if n not in taken)
    return MergePlan(alignment, settings, groups, from_anchor, tuple(unmeasured), linear, tuple(gram_sets))


def _groups(
    solved: dict[str, LinearModule],
    settings: MergeSettings,
    gram_sets: Sequence[GramSet],
    experts: Sequence[AlignedExpert],
    merged: set[str],
) -> tuple[ModuleGroup, ...]:
    # The data-free Gram is each module's own (U^T U), so only measured Grams are shared, and only where every expert's are.
    members: dict[tuple[Any, ...], list[LinearModule]] = {}
    for name, module in solved.items():
        with_bias = settings.fit_bias and module.bias in merged
        if settings.gram_source == "data":
            shared = tuple(g.group(resolve_module(g, e, name)) for g, e in zip(gram_sets, experts, strict=True))
            members.setdefault((shared, with_bias), []).append(module)
        else:
            members[(name, with_bias)] = [module]
    return tuple(ModuleGroup(tuple(own), own[0].in_features, key[1]) for key, own in members.items())


def resolve_module(grams: GramSet, expert: AlignedExpert, name: str) -> str:
    """The name under which `grams` knows the module that the base calls `name`. Raises `GramMismatchError`."""
    found = _find(grams, expert, name)
    if found is None:
        raise grams.unknown(expert.own_module(name))
    return found


def _find(grams: GramSet, expert: AlignedExpert, name: str) -> str | None:
    """A Gram set goes by its own model's names: the expert's, or, measured on the bare encoder, the base's."""
    return grams.resolve(expert.own_module(name)) or grams.resolve(name)


def _modules_of(grams: GramSet, expert: AlignedExpert, stored: dict[str, tuple[int, ...]]) -> dict[str, LinearModule]:
    found = {}
    for weight, shape in stored.items():
        name = weight.removesuffix(".weight")
        own = _find(grams, expert, name) if weight.endswith(".weight") and len(shape) == 2 else None
        if own is not None:
            transposed = own in grams.transposed
            out_features, in_features = shape[::-1] if transposed else shape
            found[name] = LinearModule(name, out_features, in_features, transposed, f"{name}.bias" in stored)
    return found

"""Does what was measured belong to the experts of a merge? Names, widths and shapes, from headers alone; and can its weights be told at all?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bmm_engine.errors import GramMismatchError, ShapeMismatchError
from bmm_engine.merging.align import AlignedExpert
from bmm_engine.models.architecture import LinearModule
from bmm_engine.recipe.settings import MergeSettings
from bmm_engine.statistics.fisher import FisherSet
from bmm_engine.statistics.grams import GramSet
from bmm_engine.statistics.measured import MeasuredSet
from bmm_engine.statistics.sensitivity import SensitivitySet


def find_module(grams: GramSet, expert: AlignedExpert, name: str) -> str | None:
    """What `grams` call the module that the base calls `name`: they go by their own model's names, the expert's, or, measured on the bare encoder,
    the base's, or those of a live model."""
    return next((found for known in expert.modules_known_as(name) if (found := grams.resolve(known)) is not None), None)


def resolve_module(grams: GramSet, expert: AlignedExpert, name: str) -> str:
    """The same. Raises `GramMismatchError` where the set does not hold the module."""
    found = find_module(grams, expert, name)
    if found is None:
        raise grams.unknown(expert.own_module(name))
    return found


def measured_modules(
    linear: Mapping[str, LinearModule],
    experts: Sequence[AlignedExpert],
    gram_sets: Sequence[GramSet],
    settings: MergeSettings,
) -> dict[str, LinearModule]:
    """Those of the `linear` modules for which every expert has a Gram, each of the module's width and with the hash of its weight.

    Raises `GramMismatchError` for a set that holds none of them, or not all that another one holds, or lacks one that the settings name.
    """
    known = [{name for name in linear if find_module(g, e, name)} for g, e in zip(gram_sets, experts, strict=True)]
    for grams, expert, own in zip(gram_sets, experts, known, strict=True):
        if linear and not own:
            first = expert.own_module(next(iter(linear)))
            raise GramMismatchError(
                f"{grams.where}: holds no Gram for module {first!r}, nor for any other of the {len(linear)} linear modules of {expert.label}; it has"
                f" {len(grams.modules)}, such as {_some(grams.modules)}. It was measured on another model: collect Grams from this expert, and list"
                " them in the order of the experts."
            )
        lacking = [name for name in linear if name not in own]
        if lacking and settings.modules is not None:  # named, so it is missed
            raise grams.unknown(expert.own_module(lacking[0]))
        uneven = [name for name in lacking if any(name in other for other in known)]
        if uneven and not settings.unchecked_statistics:
            fuller = next(g for g, other in zip(gram_sets, known, strict=True) if uneven[0] in other)
            raise GramMismatchError(
                f"{grams.where}: holds no Gram for {len(uneven)} modules that {fuller.where} has one for, the first is"
                f" {expert.own_module(uneven[0])!r}; it holds {len(own)} of the {len(linear)} linear modules of {expert.label}. Collect both with the"
                " same modules, name those to solve with `modules`, or say `unchecked_statistics: true` to solve only what all have."
            )
    measured = {name: module for name, module in linear.items() if all(name in own for own in known)}
    if linear and not measured:
        raise GramMismatchError(
            f"{', '.join(grams.where for grams in gram_sets)}: no linear module has a Gram in all of them, so that nothing can be solved. Collect"
            " them again, with the same modules."
        )
    for name, module in measured.items():
        for grams, expert in zip(gram_sets, experts, strict=True):
            own_name = resolve_module(grams, expert, name)
            width = grams.width(own_name)
            if width != module.in_features:
                raise GramMismatchError(
                    f"{grams.where}: the Gram of {name!r} has width {width}, the module reads {module.in_features} features. It was measured"
                    " on another model; collect it again from this expert."
                )
    for grams, expert in zip(gram_sets, experts, strict=True):
        _check_hashed(grams, (resolve_module(grams, expert, name) for name in measured), expert, settings)
    return measured


def check_fishers(
    merged: Iterable[str], experts: Sequence[AlignedExpert], fishers: Sequence[FisherSet], settings: MergeSettings
) -> None:
    """Raise unless every tensor to be merged has Fisher information of its shape, of every expert, with the hash of its weight: `MissingTensorError`,
    `ShapeMismatchError`, `GramMismatchError`. Buffers have none."""
    names = tuple(merged)
    for fisher, expert in zip(fishers, experts, strict=True):
        used = []
        for name in names:
            own = fisher_name(fisher, expert, name)
            if own in fisher.buffers:
                continue
            shape, wanted = fisher.shape(own), tuple(expert.spec(name).shape)
            if shape != wanted:
                raise ShapeMismatchError(
                    f"{fisher.where}: the Fisher information of {own!r} has shape {shape}, the tensor of {expert.label} {wanted}. It was measured on"
                    " another model; collect it again from this expert."
                )
            used.append(fisher.resolve(own) or own)
        _check_hashed(fisher, used, expert, settings)


def fisher_name(fisher: FisherSet, expert: AlignedExpert, name: str) -> str:
    """What the set calls the tensor that the base calls `name`; the expert's own name where it holds none."""
    names = expert.known_as(name)
    return next((n for n in names if fisher.resolve(n) is not None or n in fisher.buffers), names[0])


def check_sensitivities(
    solved: Iterable[LinearModule],
    experts: Sequence[AlignedExpert],
    sensitivities: Sequence[SensitivitySet],
    settings: MergeSettings,
) -> None:
    """Raise unless every module to be solved has a sensitivity of its outputs, of every expert, with the hash of its weight: `MissingTensorError`,
    `ShapeMismatchError`, `GramMismatchError`."""
    modules = tuple(solved)
    for own, expert in zip(sensitivities, experts, strict=True):
        names = [sensitivity_name(own, expert, module) for module in modules]
        _check_hashed(own, (own.resolve(name) or name for name in names), expert, settings)


def sensitivity_name(own: SensitivitySet, expert: AlignedExpert, module: LinearModule) -> str:
    """What the set calls a module. Raises `MissingTensorError`, `ShapeMismatchError`."""
    names = expert.modules_known_as(module.name)
    known = next((name for name in names if own.resolve(name) is not None), names[0])
    shape = own.shape(known)
    if shape != (module.out_features, module.out_features):
        raise ShapeMismatchError(
            f"{own.where}: the sensitivity of {known!r} has shape {shape}, the module gives {module.out_features} features."
            " It was measured on another model; collect it again from this expert."
        )
    return known


def _check_hashed(
    own: GramSet | MeasuredSet, names: Iterable[str], expert: AlignedExpert, settings: MergeSettings
) -> None:
    """Raise `GramMismatchError` for a file that does not say on which weights it was measured, unless the settings take it as it is."""
    if settings.unchecked_statistics or not own.on_disk:
        return
    bare = [name for name in names if name not in own.fingerprints]
    if bare:
        raise GramMismatchError(
            f"{own.where}: does not say which weights it was measured on ({len(bare)} without a fingerprint, the first {bare[0]!r}), so that"
            f" it cannot be told whether it belongs to {expert.label}. Collect it again; or, where you know that it does, say"
            " `unchecked_statistics: true` (`bmm merge --unchecked-statistics`)."
        )


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3])

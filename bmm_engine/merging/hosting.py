"""A host: the expert whose checkpoint the output is, with the merged tensors in the place of its own. What only it has is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from bmm_engine.checkpoint import TensorSource
from bmm_engine.checkpoint.hosted import HostedSource
from bmm_engine.checkpoint.vocabulary import Reader, is_vocabulary_tensor
from bmm_engine.errors import ConfigError, listed, shown
from bmm_engine.merging.advice import missing_tensors, other_shape
from bmm_engine.merging.buffers import all_buffers, constant_buffers
from bmm_engine.merging.matching import Matcher, known_naming, source_naming
from bmm_engine.recipe.settings import MergeSettings


def host_of(settings: MergeSettings, experts: Sequence[TensorSource]) -> int | None:
    """The place of the host among the experts: the one that the settings name, the first for a rule that has one, or None. Raises `ConfigError`."""
    host = settings.host
    if host is None:
        return 0 if settings.rule.others == "first" else None
    labels = [expert.label for expert in experts]
    if isinstance(host, int):
        if host >= len(experts):
            raise ConfigError(
                f"host is {host}, and the last of the {len(experts)} experts is {len(experts) - 1}; the first is 0."
            )
        return host
    found = [i for i, label in enumerate(labels) if host in (label, Path(label).name)]
    if len(found) != 1:
        which = "two experts are called so" if found else "no expert is called so"
        raise ConfigError(
            f"host is {shown(host)}, but {which}; say which by its place, from 0, or by one of {listed(map(repr, labels))}."
        )
    return found[0]


def hosted(
    base: TensorSource, host: TensorSource, patterns: Sequence[str], live: nn.Module | None
) -> tuple[HostedSource, tuple[str, ...]]:
    """The base as the host would hold it, and notes on what is kept of the host although the base has it. `patterns`: of tensors that are not
    merged, which the host may lack.

    Raises `MissingTensorError` for a tensor of the base's that the host lacks, `ShapeMismatchError` for one that has another shape there.
    """
    naming = known_naming(base, [host], live)
    names = [n for n in (*base.names(), *base.aliases) if base.spec(n).dtype.is_floating_point]
    optional = all_buffers(base, names, naming) | set(base.aliases)
    spared = optional | {n for n in names if any(fnmatchcase(n, p) for p in patterns)}
    matcher = Matcher(host, naming, exchanged=True)
    mapping = matcher.match_merged(names, base)
    wanted = [n for n in names if n not in spared]
    if any(n not in mapping for n in wanted):
        raise missing_tensors(base, [host], 0, wanted, [{n: o for n, o in mapping.items() if n in wanted}], matcher)
    constant = constant_buffers(host, host.names(), source_naming(host))
    reader, found, uneven = Reader(host, mapping), dict[str, str](), []
    for name, own in mapping.items():
        if own in host.aliases or own in found or own in constant or not host.spec(own).dtype.is_floating_point:
            continue
        ours, theirs = base.spec(name).shape, host.spec(own).shape
        if ours == theirs:
            found[own] = name
        elif name in optional:
            continue
        elif ours[1:] == theirs[1:] and is_vocabulary_tensor(base, name) and is_vocabulary_tensor(host, own):
            uneven.append(own)
        else:
            raise other_shape(base, reader, name, False)
    view = HostedSource(base, host, found)
    return view, (kept_rows(uneven, base, host),) if uneven else ()


def kept_rows(names: Sequence[str], other: TensorSource, host: TensorSource) -> str:
    """The note on tensors of unequal rows."""
    return f"{other.label}: has other rows in {listed(names, 200)} than the host {host.label}, whose own are kept."


def has_own_place(view: HostedSource) -> bool:
    """Whether the host is another network than the base: by other names, or with weights that the base lacks."""
    own = (n for n in view.own if view.host.spec(n).dtype.is_floating_point)
    return any(n not in view.base for n in own) or any(n != o for n, o in view.names_of_base.items())


def refuse_other_network(view: HostedSource | None, what: str) -> None:
    """Raise `ConfigError` where a merge with a host cannot be `what`, which runs the base's network."""
    if view is not None and has_own_place(view):
        only = next((n for n in view.own if n not in view.base), view.host.names()[0])
        raise ConfigError(
            f"{view.host.label}: is the host, and of another network than the base {view.base.label} (it has {only!r}): {what} runs the base's. Merge"
            " with `bmm merge` and mode: plain, and judge the output by itself."
        )


Config = Mapping[str, Any] | None


def comparable(ours: Config, theirs: Config) -> tuple[Config, Config]:
    """Two configs, or, where one is of a model that is made of several, its section of the other's kind of model."""
    if ours is None or theirs is None or ours.get("model_type") == theirs.get("model_type"):
        return ours, theirs
    return _section(ours, theirs) or ours, _section(theirs, ours) or theirs


def _section(whole: Mapping[str, Any], other: Mapping[str, Any]) -> Config:
    alike = [s for s in whole.values() if isinstance(s, Mapping) and s.get("model_type") == other.get("model_type")]
    return alike[0] if len(alike) == 1 else None

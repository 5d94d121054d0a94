"""Line up base and experts: one set of names and shapes, or a clear word about what does not fit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

from torch import Tensor, nn

from bmm_engine.checkpoint import TensorSource, TensorSpec
from bmm_engine.checkpoint.compose import root_checkpoint
from bmm_engine.checkpoint.hosted import HostedSource
from bmm_engine.checkpoint.names import change_prefix
from bmm_engine.checkpoint.quantised import refuse_quantised
from bmm_engine.checkpoint.renamed import RenamedSource
from bmm_engine.checkpoint.unequal import fit, unequal_tensors
from bmm_engine.checkpoint.untied import UntiedSource
from bmm_engine.checkpoint.vocabulary import Reader, is_vocabulary_tensor
from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.merging.advice import missing_tensors, other_shape
from bmm_engine.merging.buffers import all_buffers, constant_buffers
from bmm_engine.merging.hosting import has_own_place, hosted, kept_rows
from bmm_engine.merging.matching import Matcher, in_layout_of, known_naming
from bmm_engine.merging.untied_heads import with_own_heads
from bmm_engine.models.naming import Naming

logger = logging.getLogger(__name__)


class AlignedExpert:
    """An expert read by the base's names, in whatever layout it has them: `mapping` of what is merged, `kept` of what is kept from the base but is
    there in the expert too."""

    def __init__(
        self,
        source: TensorSource,
        mapping: dict[str, str],
        prefix: str = "",
        kept: Mapping[str, str] | None = None,
        spellings: Mapping[str, tuple[str, ...]] | None = None,
    ):
        self.source = source
        self.mapping = mapping  # base name -> expert name
        self.prefix = prefix  # "" | "+bert." (the expert has it, the base has not) | "-bert."
        self.kept = dict(kept or {})
        self.spellings = spellings or {}  # base name -> what else the architecture calls it

    @property
    def label(self) -> str:
        return self.source.label

    def own_name(self, name: str) -> str | None:
        """What the expert calls a tensor of the base, merged or kept; None where it has none."""
        return self.mapping.get(name, self.kept.get(name))

    def known_as(self, name: str) -> tuple[str, ...]:
        """By which names a tensor of the base may be known where it was measured: the expert's, the base's, the architecture's."""
        return tuple(dict.fromkeys((self.own_name(name) or name, name, *self.spellings.get(name, ()))))

    def modules_known_as(self, module: str) -> list[str]:
        """The same of a module."""
        return [name.removesuffix(".weight") for name in self.known_as(f"{module}.weight")]

    def own_module(self, module: str) -> str:
        return self.mapping.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")

    def spec(self, name: str) -> TensorSpec:
        return self.source.spec(self.mapping[name])

    def load(self, name: str, rows: slice | None = None) -> Tensor:
        return self.source.load(self.mapping[name], rows)


@dataclass(frozen=True)
class Alignment:
    """`merged`: the base's tensors that every expert has, in the base's order; `kept`: those taken from the base as they are (integers, buffers, and
    what `keep_base` names), `buffers` among them; `expert_only`: label -> tensors that only that expert has (task heads), left out of the merge;
    `expert_buffers`: the same of what is no weight; `notes`: what whoever merges should know. `host`: the expert whose checkpoint the output is; then
    the base is read as the view `hosted`, by its names. `live`: the base as a live model, where the tensors go by its names."""

    base: TensorSource
    experts: tuple[AlignedExpert, ...]
    merged: tuple[str, ...]
    kept: tuple[str, ...]
    expert_only: dict[str, tuple[str, ...]]
    buffers: tuple[str, ...] = ()
    expert_buffers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    naming: Naming | None = None
    notes: tuple[str, ...] = ()
    host: int | None = None
    hosted: HostedSource | None = None
    live: nn.Module | None = None


def align(
    base: TensorSource,
    experts: Sequence[TensorSource],
    keep_base: Iterable[str] = (),
    vocabulary: str = "error",
    live: nn.Module | None = None,
    host: int | None = None,
) -> Alignment:
    """Match the experts' tensors to the base's names and check every shape, reading headers, and of what may be tied or a mask the values.

    `keep_base`: shell patterns of base tensors to copy from the base instead of merging. `vocabulary`: what to do where embeddings or output
    heads differ in rows: "error", "crop" or "pad" (see `checkpoint/unequal.py`). `live`: the base itself, where it was given as a live model.
    `host`: the expert whose checkpoint the output is; what only it has is kept, and where its vocabulary is another, its rows are.
    Raises `MissingTensorError` (tensor, expert), `ShapeMismatchError` (tensor, both shapes), `CheckpointError` for quantised models, `ConfigError`
    for a pattern that matches nothing.
    """
    if vocabulary not in ("error", "crop", "pad"):
        raise ConfigError(f"vocabulary must be 'error', 'crop' or 'pad', not {vocabulary!r}.")
    refuse_quantised(base)
    for source in experts:
        refuse_quantised(source, integers=False)
    patterns = tuple(keep_base)
    view, notes = None, tuple[str, ...]()
    if host is not None:
        if vocabulary != "error":
            raise ConfigError(
                f"vocabulary: {vocabulary} does not go with a host, whose own rows are kept where others have another number; leave it out."
            )
        base, notes = hosted(base, experts[host], patterns, live)
        view = base
        live = None if has_own_place(view) else live
    naming = known_naming(base, experts, live)
    base = _loadable(base, naming)
    if view is None:
        experts = [in_layout_of(base, source, naming) for source in experts]
        base, notes = with_own_heads(base, experts, naming)
    names = base.names()
    originals = {n: (n, original(base, n)) for n in names}
    spelled: dict[str, tuple[str, ...]] = dict(originals)
    left_out: tuple[str, ...] = ()  # of a base, what its host may lack
    if view is not None:
        spelled = {n: (*both, view.names_of_base.get(both[1], n)) for n, both in originals.items()}
        left_out = view.base.names()
    for pattern in patterns:
        if not any(fnmatchcase(own, pattern) for own in (*chain.from_iterable(spelled.values()), *left_out)):
            raise ConfigError(
                f"keep_base: the pattern {pattern!r} matches no tensor of {base.label}, which has {', '.join(names[:3])} and {len(names) - 3}"
                " more. Patterns are shell patterns over tensor names, for example 'classifier.*'."
            )
    buffers = constant_buffers(base, names, naming)
    kept_names = {
        n
        for n in names
        if any(fnmatchcase(own, p) for p in patterns for own in spelled[n])
        or not base.spec(n).dtype.is_floating_point
        or n in buffers
        or (view is not None and originals[n][1] not in view.names_of_base)
    }
    matchers = [Matcher(source, naming, exchanged=view is not None) for source in experts]
    mappings = [matcher.match_merged([n for n in names if n not in kept_names], base) for matcher in matchers]
    # A buffer that is in one file and not in another is none of the weights.
    optional = all_buffers(base, names, naming) - kept_names
    lacking = {n for n in optional if any(n not in own for own in mappings)}
    buffers, kept_names = buffers | lacking, kept_names | lacking
    kept = tuple(n for n in names if n in kept_names)
    merged = tuple(n for n in names if n not in kept_names)
    mappings = [{n: own for n, own in mapping.items() if n not in lacking} for mapping in mappings]
    for t, (matcher, mapping) in enumerate(zip(matchers, mappings, strict=True)):
        if len(mapping) < len(merged):
            raise missing_tensors(base, experts, t, merged, mappings, matcher)
    spellings = _spellings(names, naming)
    readers = [Reader(source, mapping) for source, mapping in zip(experts, mappings, strict=True)]
    if view is not None:
        apart = [[n for n in merged if _differ_in_vocabulary(base, reader, n)] for reader in readers]
        notes += tuple(kept_rows(own, r.source, view.host) for own, r in zip(apart, readers, strict=True) if own)
        uneven = {n for own in apart for n in own}
        view.keep_own(originals[n][1] for n in uneven)
        merged, kept = tuple(n for n in merged if n not in uneven), tuple(n for n in names if n in {*kept, *uneven})
        mappings = [{n: own for n, own in mapping.items() if n not in uneven} for mapping in mappings]
    if vocabulary != "error":
        base, experts = _fit(base, readers, merged, kept, vocabulary)
    aligned, expert_only, expert_buffers = [], {}, {}
    for source, matcher, mapping in zip(experts, matchers, mappings, strict=True):
        for name in merged:
            ours, theirs = base.spec(name), source.spec(mapping[name])
            if ours.shape != theirs.shape:
                raise other_shape(
                    base, Reader(source, mapping), name, _differ_in_vocabulary(base, Reader(source, mapping), name)
                )
            if not theirs.dtype.is_floating_point:
                raise ShapeMismatchError(
                    f"{name}: {ours.dtype} in {base.label}, {theirs.dtype} in {source.label}. Quantised checkpoints cannot be merged; use the"
                    " original floating-point weights."
                )
        own_kept = matcher.kept(kept)
        # Those of what the base ties; others would have become tensors of their own.
        copies = matcher.match(tuple(base.aliases)) if base.aliases else {}
        aligned.append(AlignedExpert(source, mapping, matcher.prefix, own_kept, spellings))
        used = {
            *mapping.values(),
            *own_kept.values(),
            *copies.values(),
            *kept,
            *(change_prefix(matcher.prefix, n) for n in kept),
        }
        held = {source.aliases.get(n, n) for n in used}
        left = [n for n in source.names() if n not in used and n not in held]
        constant = all_buffers(source, left, naming)
        expert_only[source.label] = tuple(n for n in left if n not in constant)
        expert_buffers[source.label] = tuple(n for n in left if n in constant)
        _say_renamed(source, mapping)
    return Alignment(
        base,
        tuple(aligned),
        merged,
        kept,
        expert_only,
        tuple(n for n in kept if n in buffers),
        expert_buffers,
        naming,
        notes,
        host,
        view,
        live,
    )


def _loadable(base: TensorSource, naming: Naming | None) -> TensorSource:
    """A base in a folder with its config, by names that load: the output has them. One in memory, or a bare file, keeps its own."""
    if naming is None or base.config is None or root_checkpoint(base) is None:
        return base
    renamed = naming.loadable(base.names())
    if renamed:
        logger.info(
            "%s: %d of its names do not load as they are, such as %r, written as %r",
            base.label,
            len(renamed),
            *next(iter(renamed.items())),
        )
    return RenamedSource(base, renamed) if renamed else base


def _spellings(names: Sequence[str], naming: Naming | None) -> dict[str, tuple[str, ...]]:
    """The base's name -> what the architecture calls the tensor, live and in files."""
    if naming is None:
        return {}
    return {name: (live, naming.saved.get(live, live)) for name, live in naming.known(names).items()}


def original(base: TensorSource, name: str) -> str:
    """What the base's files call a tensor."""
    source: Any = base
    while not isinstance(source, RenamedSource) and isinstance(source, UntiedSource):
        source = source.source
    return source.originals.get(name, name) if isinstance(source, RenamedSource) else name


def _say_renamed(source: TensorSource, mapping: Mapping[str, str]) -> None:
    renamed = [(ours, own) for ours, own in mapping.items() if ours != own]
    if renamed:
        logger.info(
            "%s: %d of %d tensors go by another name than the base's, such as %r, which is %r there",
            source.label,
            len(renamed),
            len(mapping),
            *renamed[0],
        )


def _fit(
    base: TensorSource, readers: Sequence[Reader], merged: Sequence[str], kept: Sequence[str], vocabulary: str
) -> tuple[TensorSource, Sequence[TensorSource]]:
    """Base and experts with equal rows wherever they differ in the size of the vocabulary only."""
    uneven = [n for n in merged if any(_differ_in_vocabulary(base, reader, n) for reader in readers)]
    uneven = unequal_tensors(base, readers, merged, uneven, vocabulary)
    if not uneven:
        return base, [reader.source for reader in readers]
    left = [n for n in kept if is_vocabulary_tensor(base, n) and base.spec(n).shape[0] == base.spec(uneven[0]).shape[0]]
    if left:
        raise ConfigError(
            f"vocabulary: {vocabulary} changes the rows of {uneven[0]!r}, but {left[0]!r} is kept from the base with its"
            f" {base.spec(left[0]).shape[0]} rows (keep_base). Keep both from the base, or neither."
        )
    return fit(base, readers, uneven, vocabulary)


def _differ_in_vocabulary(base: TensorSource, reader: Reader, name: str) -> bool:
    own = reader.names[name]
    ours, theirs = base.spec(name).shape, reader.source.spec(own).shape
    return (
        ours != theirs
        and ours[1:] == theirs[1:]
        and is_vocabulary_tensor(base, name)
        and is_vocabulary_tensor(reader.source, own)
    )

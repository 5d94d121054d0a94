"""Line up base and experts: one set of names and shapes, or a clear word about what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from bmm_engine.checkpoint import TensorSource, TensorSpec
from bmm_engine.checkpoint.names import change_prefix, modern_name, prefix_changes
from bmm_engine.checkpoint.unequal import fit, unequal_tensors
from bmm_engine.checkpoint.vocabulary import Reader, is_vocabulary_tensor
from bmm_engine.errors import ConfigError, MissingTensorError, ShapeMismatchError


class AlignedExpert:
    """An expert read by the base's names: a prefix more or less (`bert.`), legacy LayerNorm names, tied tensors."""

    def __init__(self, source: TensorSource, mapping: dict[str, str], prefix: str):
        self.source = source
        self.mapping = mapping  # base name -> expert name
        self.prefix = prefix  # "" | "+bert." (the expert has it, the base has not) | "-bert."

    @property
    def label(self) -> str:
        return self.source.label

    def own_module(self, module: str) -> str:
        return self.mapping.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")

    def spec(self, name: str) -> TensorSpec:
        return self.source.spec(self.mapping[name])

    def load(self, name: str, rows: slice | None = None) -> Tensor:
        return self.source.load(self.mapping[name], rows)


@dataclass(frozen=True)
class Alignment:
    """`merged`: the base's tensors that every expert has, in the base's order; `kept`: those taken from the base as they are (integers, and
    what `keep_base` names); `expert_only`: label -> tensors that only that expert has (task heads), left out of the merge."""

    base: TensorSource
    experts: tuple[AlignedExpert, ...]
    merged: tuple[str, ...]
    kept: tuple[str, ...]
    expert_only: dict[str, tuple[str, ...]]


def align(
    base: TensorSource, experts: Sequence[TensorSource], keep_base: Iterable[str] = (), vocabulary: str = "error"
) -> Alignment:
    """Match the experts' tensors to the base's names and check every shape, reading headers only.

    `keep_base`: shell patterns of base tensors to copy from the base instead of merging. `vocabulary`: what to do where embeddings or output
    heads differ in rows: "error", "crop" or "pad" (see `checkpoint/unequal.py`).
    Raises `MissingTensorError` (tensor, expert) and `ShapeMismatchError` (tensor, both shapes), `ConfigError` for a pattern that matches
    nothing.
    """
    if vocabulary not in ("error", "crop", "pad"):
        raise ConfigError(f"vocabulary must be 'error', 'crop' or 'pad', not {vocabulary!r}.")
    patterns = tuple(keep_base)
    names = base.names()
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise ConfigError(
                f"keep_base: the pattern {pattern!r} matches no tensor of {base.label}, which has {', '.join(names[:3])} and {len(names) - 3}"
                " more. Patterns are shell patterns over tensor names, for example 'classifier.*'."
            )
    kept = tuple(
        n for n in names if any(fnmatchcase(n, p) for p in patterns) or not base.spec(n).dtype.is_floating_point
    )
    merged = tuple(n for n in names if n not in set(kept))
    mappings = [_best_mapping(merged, source) for source in experts]
    for source, (mapping, _) in zip(experts, mappings, strict=True):
        _check_complete(base, source, merged, mapping)
    readers = [Reader(source, mapping) for source, (mapping, _) in zip(experts, mappings, strict=True)]
    if vocabulary != "error":
        base, experts = _fit(base, readers, merged, kept, vocabulary)
    aligned, expert_only = [], {}
    for source, (mapping, prefix) in zip(experts, mappings, strict=True):
        for name in merged:
            ours, theirs = base.spec(name), source.spec(mapping[name])
            if ours.shape != theirs.shape:
                raise _shape_mismatch(base, Reader(source, mapping), name)
            if not theirs.dtype.is_floating_point:
                raise ShapeMismatchError(
                    f"{name}: {ours.dtype} in {base.label}, {theirs.dtype} in {source.label}. Quantised checkpoints cannot be merged; use the"
                    " original floating-point weights."
                )
        aligned.append(AlignedExpert(source, mapping, prefix))
        used = set(mapping.values()) | {mapping.get(n, n) for n in kept} | {change_prefix(prefix, n) for n in kept}
        expert_only[source.label] = tuple(n for n in source.names() if n not in used)
    return Alignment(base, tuple(aligned), merged, kept, expert_only)


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


def _shape_mismatch(base: TensorSource, reader: Reader, name: str) -> ShapeMismatchError:
    ours, theirs = base.spec(name).shape, reader.source.spec(reader.names[name]).shape
    text = f"{name}: shape {ours} in {base.label}, {theirs} in {reader.source.label}. "
    if _differ_in_vocabulary(base, reader, name):
        fewer, more = sorted((ours[0], theirs[0]))
        text += (
            f"The vocabularies differ; if token i is the same in both, `vocabulary: crop` merges the first {fewer} tokens,"
            f" `vocabulary: pad` all {more}."
        )
    else:
        text += f"Merge fine-tunes of one base; to take this tensor from the base, add it to keep_base: ['{name}']."
    return ShapeMismatchError(text)


def _best_mapping(names: Sequence[str], source: TensorSource) -> tuple[dict[str, str], str]:
    """The prefix change under which most of `names` are found in `source`."""
    own = {modern_name(n): n for n in (*source.names(), *source.aliases)}
    best: dict[str, str] = {}
    chosen = ""
    for prefix in prefix_changes(names, own):
        mapping = {}
        for name in names:
            # What already agrees (a head beside a prefixed body) keeps its name.
            found = own.get(modern_name(change_prefix(prefix, name))) or own.get(modern_name(name))
            if found is not None:
                mapping[name] = found
        if len(mapping) > len(best):
            best, chosen = mapping, prefix
    return best, chosen


def _check_complete(base: TensorSource, source: TensorSource, merged: Sequence[str], mapping: dict[str, str]) -> None:
    missing = [n for n in merged if n not in mapping]
    if not missing:
        return
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    if len(missing) == len(merged):
        example = next(iter(source.names()), "nothing")
        raise MissingTensorError(
            f"{source.label} shares no tensor with the base {base.label}: the base has {missing[0]!r}{more}, the expert {example!r}. Is it a"
            " fine-tune of this base, and a full checkpoint?"
        )
    raise MissingTensorError(
        f"{source.label} has no tensor {missing[0]!r}{more}, which the base {base.label} has. If it is a head that need not be merged, keep the"
        f" base's: keep_base: ['{_common_pattern(missing, merged)}']; if not, the expert is incomplete."
    )


def _common_pattern(missing: Sequence[str], merged: Sequence[str]) -> str:
    """`HEAD.*` where that names just what is missing, else the first name."""
    top = missing[0].split(".")[0] + "."
    whole = [n for n in merged if n.startswith(top)]
    return f"{top}*" if len(missing) > 1 and list(missing) == whole else missing[0]

"""What an expert lacks, and why: each cause with a remedy of its own, and none that drops what was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bmm_engine.checkpoint import TensorSource
from bmm_engine.checkpoint.ties import equal_tensors, may_be_tied
from bmm_engine.checkpoint.vocabulary import Reader
from bmm_engine.errors import MissingTensorError, ShapeMismatchError, listed
from bmm_engine.merging.matching import Matcher, source_naming
from bmm_engine.models.names import modern_name

_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output_projection|classifier\w*|\w*_classifier|score|qa_outputs|cls|head|heads|fc|vocab_\w+|pre_classifier"
    r"|logits_proj|pooler|pooling|projector|summary|sequence_summary|mlm_head|decode_head|predictions|generator_\w+|discriminator_\w+)(\.|$)"
)
_LAYER = re.compile(r"^(.*?\.)(\d+)\.")
_SAVE_AGAIN = "load it with the class that it was saved from and save it again (from_pretrained, then save_pretrained)"


def missing_tensors(
    base: TensorSource,
    experts: Sequence[TensorSource],
    t: int,
    merged: Sequence[str],
    mappings: Sequence[Mapping[str, str]],
    matcher: Matcher,
) -> MissingTensorError:
    """The error for expert `t`, which lacks some of the `merged` tensors; `mappings`: of all experts, base name -> own name."""
    source, mapping = experts[t], mappings[t]
    missing = [name for name in merged if name not in mapping]
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    if len(missing) == len(merged):
        example = next(iter(source.names()), "nothing")
        return MissingTensorError(
            f"{source.label} shares no tensor with the base {base.label}: the base has {missing[0]!r}{more}, the expert {example!r}. Is it a"
            " fine-tune of this base, and a full checkpoint?"
        )
    what = f"{source.label} has no tensor {missing[0]!r}{more}, which the base {base.label} has."
    used = set(mapping.values())
    spare = [name for name in source.names() if name not in used]
    cause = (
        _tied(base, source, missing, mapping)
        or _fewer_layers(source, missing, mapping)
        or _renamed(base, source, missing, spare)
        or _head(base, experts, missing, merged, mappings)
        or "The expert is incomplete, or no fine-tune of this base: download it again, or save it again whole (save_pretrained of the model that was"
        " trained)."
    )
    return MissingTensorError(f"{what} {cause}")


def _tied(base: TensorSource, source: TensorSource, missing: Sequence[str], mapping: Mapping[str, str]) -> str | None:
    """A head that may be the embeddings, in an expert that does not say so."""
    for name in missing:
        holder = may_be_tied(name, mapping)
        if holder is None or source_naming(source) is not None:
            continue
        return (
            f"It may be tied to {mapping[holder]!r}, which the expert has; its files do not say whether it is. If it is, pass the expert as a folder"
            " whose config.json says tie_word_embeddings: true; if not, pass the whole model, head included."
        )
    return None


def _fewer_layers(source: TensorSource, missing: Sequence[str], mapping: Mapping[str, str]) -> str | None:
    lacking: dict[str, set[int]] = {}
    for name in missing:
        if found := _LAYER.match(name):
            lacking.setdefault(found[1], set()).add(int(found[2]))
    for stack, layers in lacking.items():
        there = {int(found[2]) for name in mapping if (found := _LAYER.match(name)) and found[1] == stack}
        whole = sorted(layers - there)
        if whole and there:
            return (
                f"It lacks whole layers: {listed(f'{stack}{layer}' for layer in whole)}; it has {len(there)} of them. A model of another depth is no"
                " fine-tune of this base: merge models of one depth (stacks of layers: `slices` in the recipe), or download the expert again."
            )
    return None


def _renamed(base: TensorSource, source: TensorSource, missing: Sequence[str], spare: Sequence[str]) -> str | None:
    """Tensors of the same shape that the base has no name for; or others beside them, where a version has fused or split tensors."""
    first = missing[0]
    wanted, ending = base.spec(first).shape, modern_name(first).rsplit(".", 1)[-1]
    shapes = {name: source.spec(name).shape for name in spare}
    alike = [n for n in spare if shapes[n] == wanted and modern_name(n).rsplit(".", 1)[-1] == ending]
    if alike and len(spare) >= len(missing):
        return (
            f"It has {alike[0]!r} of the same shape, which the base lacks: they may be one tensor by the names of two versions, and which is which"
            f" cannot be told. Bring base and expert into one layout: {_SAVE_AGAIN}, both with one version of transformers."
        )
    near = [n for n in spare if len(shapes[n]) >= len(wanted) and _common(n, first) >= 3]
    if near:
        return (
            f"It has {near[0]!r} {shapes[near[0]]} in its place: another version of transformers stores such tensors fused or split. Bring base and"
            f" expert into one layout: {_SAVE_AGAIN}, both with one version of transformers."
        )
    return None


def _common(name: str, other: str) -> int:
    """How many leading parts two names share."""
    parts = list(zip(name.split("."), other.split("."), strict=False))
    return next((count for count, (ours, theirs) in enumerate(parts) if ours != theirs), len(parts))


def _head(
    base: TensorSource,
    experts: Sequence[TensorSource],
    missing: Sequence[str],
    merged: Sequence[str],
    mappings: Sequence[Mapping[str, str]],
) -> str | None:
    if not all(_HEAD.search(name) for name in missing):
        return None
    kept = f"keep_base: {_patterns(missing, merged)}"
    trained = [
        source.label
        for source, mapping in zip(experts, mappings, strict=True)
        if any(n in mapping and not _same(base, n, source, mapping[n]) for n in missing)
    ]
    if not trained:
        return f"It is a head that no expert has trained: keep the base's with {kept}."
    return (
        f"It is a head, which {listed(trained)} trained: an output cannot have both it and none. Save the expert with its head (the class that was"
        f" trained, not its encoder), or every expert without one; then the base's is kept with {kept}."
    )


def _same(base: TensorSource, name: str, source: TensorSource, own: str) -> bool:
    return equal_tensors(
        replace(base.spec(name), name=name), replace(source.spec(own), name=own), base.load, source.load
    )


def no_head(base: TensorSource, source: TensorSource, alias: str) -> MissingTensorError:
    """The error for an expert whose config says that its head is a tensor of its own, and whose files hold none."""
    return MissingTensorError(
        f"{source.label} has no tensor {alias!r}, while its config.json says that it is not tied (tie_word_embeddings). Where the model that was"
        f" trained ties it to its embeddings, as {base.label} does, correct that key; if not, its head is missing: save it again whole."
    )


def other_shape(base: TensorSource, reader: Reader, name: str, in_vocabulary: bool) -> ShapeMismatchError:
    """The error for a tensor of another shape in an expert."""
    ours, theirs = base.spec(name).shape, reader.source.spec(reader.names[name]).shape
    text = f"{name}: shape {ours} in {base.label}, {theirs} in {reader.source.label}. "
    if in_vocabulary:
        fewer, more = sorted((ours[0], theirs[0]))
        text += (
            f"The vocabularies differ; if token i is the same in both, `vocabulary: crop` merges the first {fewer} tokens,"
            f" `vocabulary: pad` all {more}."
        )
    elif _HEAD.search(name):
        pattern = f"{name.rsplit('.', 1)[0]}.*" if "." in name else name
        text += (
            "It is a head for other outputs, and heads of different tasks cannot be one. To merge what is below them, keep the base's head with"
            f" keep_base: ['{pattern}']; each expert's own stays in its files, to be put on the merged body."
        )
    else:
        text += "The expert is of another size than the base, so no fine-tune of it: merge fine-tunes of one base."
    return ShapeMismatchError(text)


def _patterns(missing: Sequence[str], merged: Sequence[str]) -> list[str]:
    """`HEAD.*` where that names just what is missing, else names."""
    found: dict[str, None] = {}
    for name in missing:
        top = name.split(".")[0] + "."
        whole = [n for n in merged if n.startswith(top)]
        found[f"{top}*" if len(whole) > 1 and set(whole) <= set(missing) else name] = None
    return list(found)

"""Do the base's config and its tensors tell of one network, and the experts' configs of the same? And does what was written load?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from bmm_engine.checkpoint import Checkpoint, TensorSource
from bmm_engine.checkpoint.compose import root_checkpoint
from bmm_engine.checkpoint.config_differences import config_differences
from bmm_engine.checkpoint.tokens import check_tokens
from bmm_engine.checkpoint.vocabulary import is_vocabulary_tensor
from bmm_engine.errors import CheckpointError, ConfigError
from bmm_engine.merging.align import Alignment
from bmm_engine.merging.hosting import comparable
from bmm_engine.models.buffers import looks_constant
from bmm_engine.models.building import UnknownArchitectureError
from bmm_engine.models.loading import Loading, loading_of
from bmm_engine.recipe.settings import MergeSettings

logger = logging.getLogger(__name__)

_ACCEPT = "say `unchecked_configs: true` (`bmm merge --unchecked-configs`)"
_TOLD = 4


def check_architecture(alignment: Alignment, settings: MergeSettings) -> None:
    """Raise `CheckpointError` unless the base's config builds what its tensors are: all of them but those that `keep_base` names, each of its shape,
    and none beside. A base that is no directory, or of an architecture that transformers does not know, is not checked."""
    base, root = alignment.base, root_checkpoint(alignment.base)
    if root is None or base.config is None or not root.path.is_dir() or settings.unchecked_configs:
        return
    overrides = {key: value for key, value in base.config.items() if value != (root.config or {}).get(key)}
    try:
        loading = loading_of(root.path, _held(base), overrides)
    except UnknownArchitectureError as error:
        logger.info("%s", error)
        return
    if loading is None:
        return
    fault = _fault(loading, base, tuple(settings.keep_base))
    if fault is not None:
        raise CheckpointError(
            f"{root.path / 'config.json'}: {fault} Correct the config (its `architectures`, sizes and counts), or, to merge all the same, {_ACCEPT}."
        )


def check_configs(alignment: Alignment, *, unchecked: bool, vocabulary: str = "error", accept: str = _ACCEPT) -> None:
    """Raise `ConfigError` where an expert's config makes another function of the same weights than the base's, or, where they are `unchecked`, have
    the log hear of it, as of other differences. `accept`: how to say so, for the message."""
    whose = "base" if alignment.hosted is None else "host"
    sources = [expert.source for expert in alignment.experts]
    if alignment.hosted is not None:
        sources.append(alignment.hosted.base)
    for expert in sources:
        configs = alignment.base.config, expert.config
        differences = config_differences(*(configs if alignment.hosted is None else comparable(*configs)))
        harmless = [str(one) for one in differences if not one.matters]
        if harmless:
            logger.info(
                "%s: its config differs from the base's in what does not matter: %s",
                expert.label,
                "; ".join(harmless[:_TOLD]),
            )
        # Then the output's config says how many rows it has.
        resized = vocabulary != "error" or alignment.hosted is not None
        telling = [str(one) for one in differences if one.matters and not (resized and one.key.endswith("vocab_size"))]
        if not telling:
            continue
        more = f" (and {len(telling) - _TOLD} more)" if len(telling) > _TOLD else ""
        text = f"{expert.label}: its config.json is of another function of the weights than the {whose}'s: {'; '.join(telling[:_TOLD])}{more}."
        if not unchecked:
            raise ConfigError(
                f"{text} The merged model would run with the {whose}'s. Merge fine-tunes of one base; or, where the config is wrong and not the"
                f" weights, correct it, or {accept}."
            )
        logger.warning("%s", text)


def check_rows(alignment: Alignment, settings: MergeSettings) -> None:
    """Raise `ConfigError` where embeddings that are merged as they are have different tokens in one row."""
    if settings.rule.others == "first":  # the host's embeddings, whatever theirs are
        return
    if settings.vocabulary == "error" and any(is_vocabulary_tensor(alignment.base, n) for n in alignment.merged):
        check_tokens(alignment.base, [e.source for e in alignment.experts], unchecked=settings.unchecked_configs)


def loads_back(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path` when transformers loads it, in a sentence; "" for nothing, None where that was not checked."""
    written = Checkpoint.open(path)
    if written.config is None:
        return None
    try:
        loading = loading_of(path, _held(written))
    except UnknownArchitectureError:
        return None
    except CheckpointError as error:
        return str(error)
    return None if loading is None else _fault(loading, written, ()) or ""


def _held(source: TensorSource) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every name, those of tied tensors included."""
    return {n: (source.spec(n).shape, source.spec(n).dtype) for n in (*source.names(), *source.aliases)}


def _fault(loading: Loading, source: TensorSource, asked_for: tuple[str, ...]) -> str | None:
    if loading.mismatched:
        name, (ours, built) = next(iter(loading.mismatched.items()))
        return f"{loading.model} as it describes it has {name!r} of shape {built}, the weights have {ours} ({_count(loading.mismatched)})."
    if not loading.named:
        return None
    left = [
        name
        for name in loading.unexpected
        if source.spec(name).dtype.is_floating_point
        and not looks_constant(name, source.spec(name).shape)  # masks of older versions
        and name not in source.aliases  # its tensor is there under the other name
        and not any(fnmatchcase(name, pattern) for pattern in asked_for)
    ]
    if left:
        return (
            f"{loading.model} as it describes it has no place for {len(left)} tensors of the weights, the first is {left[0]!r}: whoever loads the"
            " model would lose them."
        )
    missing = [
        name for name in loading.missing if "pool" not in name
    ]  # encoders are saved without their pooler, and run without it
    if missing:
        return (
            f"{loading.model} as it describes it has {len(missing)} tensors that the weights lack, the first is {missing[0]!r}: whoever loads the"
            " model would get random ones."
        )
    return None


def _count(names: Mapping[str, object]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"

"""Tied weights that a Hugging Face checkpoint stores once, or twice with equal bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from bmm_engine.checkpoint.source import TensorSpec
from bmm_engine.models.naming import Naming

# (tied name, patterns of the name that holds the data in order of preference, a name beside the tied one that shows
# that the model has this head at all, or None where the language-model head is a single tensor)
_TIES: tuple[tuple[str, tuple[str, ...], str | None], ...] = (
    (
        "lm_head.weight",
        ("*shared.weight", "*embed_tokens.weight", "*wte.weight", "transformer.word_embeddings.weight"),
        None,
    ),
    ("language_model.lm_head.weight", ("language_model.*embed_tokens.weight",), None),
    ("embed_out.weight", ("gpt_neox.embed_in.weight",), None),
    ("encoder.embed_tokens.weight", ("shared.weight",), None),
    ("decoder.embed_tokens.weight", ("shared.weight",), None),
    ("model.encoder.embed_tokens.weight", ("model.shared.weight",), None),
    ("model.decoder.embed_tokens.weight", ("model.shared.weight",), None),
    ("cls.predictions.decoder.weight", ("*.word_embeddings.weight",), "cls.predictions.bias"),
    ("cls.predictions.decoder.bias", ("cls.predictions.bias",), None),
    ("lm_head.decoder.weight", ("*.word_embeddings.weight",), "lm_head.bias"),
    ("lm_head.decoder.bias", ("lm_head.bias",), None),
    ("vocab_projector.weight", ("distilbert.embeddings.word_embeddings.weight",), "vocab_projector.bias"),
    ("predictions.decoder.weight", ("*.word_embeddings.weight",), "predictions.bias"),
    ("predictions.decoder.bias", ("predictions.bias",), None),
)
_COMPARE_BYTES = 64 * 2**20
Load = Callable[[str, slice | None], torch.Tensor]


def architecture_ties(naming: Naming, specs: Mapping[str, TensorSpec], load: Load) -> dict[str, str]:
    """Tied name -> holder, for what the architecture ties and the files hold at least once.

    A tied name that is stored as well is an alias only if its bytes are equal; otherwise it is a tensor of its own.
    """
    groups: dict[str, list[str]] = {}
    for tied, holder in naming.ties.items():
        groups.setdefault(holder, [holder]).append(tied)
    files = {live: file for file, live in naming.known(specs).items()} if groups else {}
    aliases: dict[str, str] = {}
    for names in groups.values():
        stored = [name for name in names if name in files]
        if not stored:
            continue
        holder = files[stored[0]]
        for name in names:
            if name not in files:
                # As the files would call it: by the live name where they have those.
                own = (
                    naming.saved.get(name, name)
                    if holder != stored[0] or stored[0] == naming.saved.get(holder)
                    else name
                )
                if own not in specs:
                    aliases[own] = holder
            elif files[name] != holder and equal_tensors(specs[files[name]], specs[holder], load):
                aliases[files[name]] = holder
    return aliases


def config_ties(
    config: dict[str, Any] | None,
    specs: dict[str, TensorSpec],
    load: Load,
) -> dict[str, str]:
    """Tied name -> holder for the known pairs of a model whose config says `tie_word_embeddings: true`.

    The holder is stored. A tied name that is stored as well is an alias only if its bytes are equal; otherwise it is a
    tensor of its own, whatever the config says.
    """
    if config is None or not (_says_tied(config) or _says_tied(config.get("text_config"))):
        return {}
    aliases: dict[str, str] = {}
    for tied, patterns, companion in _TIES:
        holder = _holder(tied, patterns, specs)
        if holder is None:
            continue
        if tied in specs:
            if equal_tensors(specs[tied], specs[holder], load):
                aliases[tied] = holder
        elif companion is None or companion in specs:
            aliases[tied] = holder
    return aliases


def _says_tied(config: Any) -> bool:
    return isinstance(config, dict) and config.get("tie_word_embeddings") is True


def _holder(tied: str, patterns: tuple[str, ...], names: Collection[str]) -> str | None:
    """The stored name that the first matching pattern finds; None when several match: the pair is not known then."""
    for pattern in patterns:
        matches = [name for name in names if name != tied and fnmatchcase(name, pattern)]
        if matches:
            return matches[0] if len(matches) == 1 else None
    return None


def may_be_tied(name: str, names: Collection[str]) -> str | None:
    """Which of `names` the tensor `name` is tied to in the models that tie it, if that is known."""
    return next(
        (found for tied, patterns, _ in _TIES if tied == name and (found := _holder(tied, patterns, names))), None
    )


def equal_tensors(first: TensorSpec, second: TensorSpec, load: Load, load_second: Load | None = None) -> bool:
    """Have two tensors, of a source or of two, the same shape, dtype and bytes?"""
    load_second = load_second or load
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    if not first.shape or first.nbytes == 0:
        return _equal(load(first.name, None), load_second(second.name, None))
    step = max(1, _COMPARE_BYTES * first.shape[0] // first.nbytes)
    parts = (slice(start, start + step) for start in range(0, first.shape[0], step))
    return all(_equal(load(first.name, rows), load_second(second.name, rows)) for rows in parts)


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    # As bytes: NaN differs from itself, and -0.0 equals 0.0.
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))

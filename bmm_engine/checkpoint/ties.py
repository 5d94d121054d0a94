"""Tied weights that a Hugging Face checkpoint stores once, or twice with equal bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import Any

import torch

from bmm_engine.checkpoint.source import TensorSpec

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


def config_ties(
    config: dict[str, Any] | None,
    specs: dict[str, TensorSpec],
    load: Callable[[str, slice | None], torch.Tensor],
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
            if _equal_bytes(specs[tied], specs[holder], load):
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


def _equal_bytes(first: TensorSpec, second: TensorSpec, load: Callable[[str, slice | None], torch.Tensor]) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    if not first.shape or first.nbytes == 0:
        return _equal(load(first.name, None), load(second.name, None))
    rows = max(1, _COMPARE_BYTES * first.shape[0] // first.nbytes)
    return all(
        _equal(load(first.name, slice(start, start + rows)), load(second.name, slice(start, start + rows)))
        for start in range(0, first.shape[0], rows)
    )


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    # As bytes: NaN differs from itself, and -0.0 equals 0.0.
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))

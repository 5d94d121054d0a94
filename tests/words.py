"""A tokenizer of whole words, and the words it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "it",
    "rained",
    "and",
    "nobody",
    "came",
    "to",
    "see",
    "show",
    "again",
]
# What it knows beside them. Without an end the words' numbers begin one earlier.
ENDED = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
ENDLESS = {"pad_token": "[PAD]", "unk_token": "[UNK]"}


def tokenizer_in(
    folder: Path, words: Sequence[str] = WORDS, special: Mapping[str, str] = ENDED, **options: object
) -> Any:
    """Made, saved beside a model, and returned; `options` as of a tokenizer of transformers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate([*special.values(), *words])}
    whole = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    whole.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, **special, **options)
    tokenizer.save_pretrained(folder)
    return tokenizer

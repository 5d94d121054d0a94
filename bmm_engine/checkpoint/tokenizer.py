"""Do models speak with one vocabulary? Their tokenizer files tell, without loading a tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bmm_engine.checkpoint.compose import checkpoints_of, root_checkpoint
from bmm_engine.checkpoint.guard import parse_json, read_bytes, read_json_object
from bmm_engine.checkpoint.layout import contained
from bmm_engine.checkpoint.source import TensorSource
from bmm_engine.errors import ConfigError

CHAT_TEMPLATE = "chat_template.jinja"
# Files of which a tokenizer has at least one; without any transformers makes an empty one, and says nothing.
_VOCABULARIES = (
    *("tokenizer.json", "tekken.json", "vocab*", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.vocab", "*.bpe"),
    *("bpe.codes", "dict.txt", "entity_vocab.json", "tokenizer.pkl"),
)
# These need none: a token is a byte, or a character.
_WITHOUT = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
# Files that fix the tokens' numbers, for tokenizers that are not one tokenizer.json.
_PLAIN_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tiktoken.model")


def check_same_tokenizer(base: TensorSource, experts: Sequence[TensorSource]) -> None:
    """Raise ConfigError, naming the first token that differs, unless all checkpoints have the base's vocabulary."""
    roots = [root_checkpoint(own) for source in (base, *experts) for own in checkpoints_of(source)]
    known = [(root.label, vocabulary_of(root.path)) for root in roots if root is not None]
    for label, vocabulary in known:
        if vocabulary is None:
            raise ConfigError(
                f"{label}: has no tokenizer file, so it cannot be told whether its tokens are those of {known[0][0]}."
            )
        if vocabulary != known[0][1]:
            raise ConfigError(
                f"{label}: its tokenizer is not that of {known[0][0]}{_difference(known[0][1], vocabulary)}. Embeddings are merged row by row, which"
                " needs the same token in every row: merge models of one tokenizer, or bring them to one first."
            )


def has_tokenizer(directory: Path) -> bool:
    """Whether a folder holds a tokenizer: some file with a vocabulary, or a kind that needs none. Raises CheckpointError for a damaged config."""
    if not directory.is_dir():
        return False
    if any(fnmatchcase(path.name, pattern) for path in directory.iterdir() for pattern in _VOCABULARIES):
        return True
    config = directory / "tokenizer_config.json"
    return config.exists() and read_json_object(config).get("tokenizer_class") in _WITHOUT


def has_processor(directory: Path) -> bool:
    """Whether a folder says how images are prepared."""
    return any((directory / name).exists() for name in ("preprocessor_config.json", "processor_config.json"))


def chat_template(directory: Path) -> str | None:
    """The template that a folder's tokenizer has for conversations, of several the default one. Raises CheckpointError for a damaged file."""
    if not directory.is_dir():
        return None
    if (directory / CHAT_TEMPLATE).exists():
        content = read_bytes(contained(directory, CHAT_TEMPLATE, asked_by=str(directory)))
        return content.decode("utf-8", "backslashreplace").strip() or None
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not (directory / name).exists():
            continue
        given = read_json_object(contained(directory, name, asked_by=str(directory))).get("chat_template")
        if isinstance(given, list):
            given = {own.get("name"): own.get("template") for own in given if isinstance(own, dict)}
        if isinstance(given, dict):
            given = given.get("default")
        if isinstance(given, str) and given.strip():
            return given.strip()
    return None


def chosen_template(asked: str | None, models: Sequence[TensorSource]) -> str | None:
    """The template that the output is to have: what was `asked` for, or, for `auto`, the one that most of the models have (of equally many, the one
    that comes first); None leaves the base's."""
    if asked != "auto":
        return asked
    roots = [root for source in models for own in checkpoints_of(source) if (root := root_checkpoint(own)) is not None]
    folders = dict.fromkeys(root.path for root in roots)
    found = Counter(template for folder in folders if (template := chat_template(folder)) is not None)
    return found.most_common(1)[0][0] if found else None


def with_template(root: Path, template: str, config_file: bytes | None = None) -> dict[str, bytes | None]:
    """File name -> what it holds, for the files beside the base at `root` that have a template of their own; None for those that go. `config_file`:
    the tokenizer's config, where it is not the base's."""
    changed: dict[str, bytes | None] = {CHAT_TEMPLATE: template.encode(), "chat_template.json": None}
    if config_file is not None or (root / "tokenizer_config.json").exists():
        if config_file is None:
            config = read_json_object(contained(root, "tokenizer_config.json", asked_by=str(root)))
        else:
            config = parse_json(config_file, str(root))
        if config.pop("chat_template", None) is not None:
            changed["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def vocabulary_of(directory: Path) -> dict[str, Any] | None:
    """Token -> number as `tokenizer.json` has it, else file name -> content of what fixes it, else None. Raises CheckpointError."""
    if not directory.is_dir():
        return None
    if (directory / "tokenizer.json").exists():
        parsed = read_json_object(contained(directory, "tokenizer.json", asked_by=str(directory)))
        model = parsed.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, list):  # Unigram: [token, score] in order
            vocabulary = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
        tokens = dict(vocabulary or {})
        tokens.update({t["content"]: t["id"] for t in parsed.get("added_tokens") or ()})
        return tokens
    files = {
        name: read_bytes(contained(directory, name, asked_by=str(directory)))
        for name in _PLAIN_FILES
        if (directory / name).exists()
    }
    if files and (directory / "added_tokens.json").exists():
        files["added_tokens.json"] = json.dumps(
            read_json_object(contained(directory, "added_tokens.json", asked_by=str(directory))), sort_keys=True
        ).encode()
    return files or None


def _difference(first: dict[str, Any] | None, second: dict[str, Any]) -> str:
    first = first or {}
    differing = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    numbers = [value.get(differing[0], "none") for value in (first, second)]
    if any(isinstance(number, bytes) for number in numbers):
        return f" (its {differing[0]} differs)"
    return f" ({len(differing)} tokens differ; {differing[0]!r} is {numbers[1]} there, {numbers[0]} here)"

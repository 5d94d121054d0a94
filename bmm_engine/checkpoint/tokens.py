"""Which token each row of an embedding is, in every model of a merge: rows of one number may be of different tokens, and of one token of different
numbers."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from bmm_engine.checkpoint.compose import root_checkpoint
from bmm_engine.checkpoint.guard import read_bytes, read_json_object
from bmm_engine.checkpoint.layout import contained
from bmm_engine.checkpoint.source import TensorSource
from bmm_engine.checkpoint.tokenizer import has_tokenizer, vocabulary_of
from bmm_engine.errors import ConfigError, shown

logger = logging.getLogger(__name__)

_FILES = (
    *(
        "tokenizer*.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "*.model",
        "*.spm",
        "*.tiktoken",
    ),
    *("tekken.json", "bpe.codes", "dict.txt", "normalizer.json"),
)
# Rows that a model keeps for tokens to come: a fine-tune may give them a name.
_RESERVED = re.compile(r"(?i)reserved|unused|placeholder|extra[_-]?(id|token)|dummy|special_token_\d|<\|?\[?pad\d+")


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens: number of each text; `added`: those that its tokenizer has beside its model's; `folder`: where its files are."""

    label: str
    folder: Path
    numbers: Mapping[str, int]
    added: Mapping[str, dict[str, Any]]

    @cached_property
    def texts(self) -> dict[int, str]:
        return {number: text for text, number in self.numbers.items()}

    @cached_property
    def rows(self) -> int:
        """The least that an embedding must have for it."""
        return max(self.numbers.values(), default=-1) + 1

    @classmethod
    def of(cls, source: TensorSource) -> Vocabulary | None:
        """Of a model whose tokenizer says its tokens in text (of a binary one they are not known). Raises CheckpointError for damaged files."""
        folder = tokenizer_folder(source)
        if folder is None:
            return None
        added = dict(_added(folder))
        found = vocabulary_of(folder)
        if (folder / "tokenizer.json").exists():
            numbers = found
        elif (folder / "vocab.json").exists():
            numbers = read_json_object(contained(folder, "vocab.json", asked_by=str(folder)))
        elif (folder / "vocab.txt").exists():
            lines = (
                read_bytes(contained(folder, "vocab.txt", asked_by=str(folder))).decode("utf-8", "replace").split("\n")
            )
            numbers = {
                line.rstrip("\r"): number for number, line in enumerate(lines) if line or number + 1 < len(lines)
            }
        else:
            return None
        numbers = {**(numbers or {}), **{text: entry["id"] for text, entry in added.items()}}
        known = {text: number for text, number in numbers.items() if type(number) is int and number >= 0}
        return cls(source.label, folder, known, added)


def tokenizer_folder(source: TensorSource) -> Path | None:
    """Where a model's own tokenizer lies: with its adapter, or with itself."""
    path = getattr(source, "path", None)
    if path is not None and path.is_dir() and has_tokenizer(path):
        return Path(path)
    root = root_checkpoint(source)
    return root.path if root is not None and has_tokenizer(root.path) else None


def _added(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Text -> entry (with `id`, as in tokenizer.json) of each token that was added."""
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        if not (folder / name).exists():
            continue
        content = read_json_object(contained(folder, name, asked_by=str(folder)))
        if name == "added_tokens.json":
            entries: list[Any] = [{"id": number, "content": text} for text, number in content.items()]
        elif name == "tokenizer.json":
            entries = content.get("added_tokens") or []
        else:
            decoder = content.get("added_tokens_decoder") or {}
            entries = [
                {**own, "id": int(i)} for i, own in decoder.items() if str(i).isdigit() and isinstance(own, dict)
            ]
        for entry in entries:
            if isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int:
                yield entry["content"], entry


def conflict(models: Sequence[Vocabulary], rows: int | None = None) -> tuple[int, Vocabulary, Vocabulary] | None:
    """The first number (below `rows`) that is one token in a model and another in one before it."""
    known: dict[int, tuple[str, Vocabulary]] = {}
    found = None
    for model in models:
        for number, text in model.texts.items():
            first = known.setdefault(number, (text, model))
            if first[0] != text and (rows is None or number < rows) and (found is None or number < found[0]):
                found = (number, first[1], model)
    return found


def described(found: tuple[int, Vocabulary, Vocabulary]) -> str:
    number, one, other = found
    return f"token {number} is {shown(one.texts[number], 60)} in {one.label}, {shown(other.texts[number], 60)} in {other.label}"


def check_tokens(base: TensorSource, experts: Sequence[TensorSource], *, unchecked: bool) -> None:
    """Of models whose embeddings are merged row by row as they are: raise ConfigError where a row is of different tokens. A row that the base
    reserves may have got a name in an expert, which is said."""
    own: dict[bytes, TensorSource] = {}
    for source in (base, *experts):
        if (folder := tokenizer_folder(source)) is not None:
            own.setdefault(_digest(folder), source)
    models = [found for source in own.values() if (found := Vocabulary.of(source)) is not None] if len(own) > 1 else []
    renamed = conflict(models)
    if renamed is None:
        return
    differing = conflict([_without_reserved(model) for model in models])
    if differing is None:
        logger.warning(
            "%s: a reserved row that got a name. The output has the base's tokenizer, so its name there.",
            described(renamed),
        )
        return
    text = f"The tokenizers differ: {described(differing)}, so one row of the embeddings would be merged of two tokens."
    if not unchecked:
        raise ConfigError(
            f"{text} `vocabulary: pad` matches the rows by the tokens' texts; or, where the two mean the same, say `unchecked_configs: true`."
        )
    logger.warning("%s", text)


def _digest(folder: Path) -> bytes:
    """Of the files that fix a tokenizer's vocabulary: most models of a merge have the very same, and need not be parsed."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json", "tokenizer_config.json"):
        digest.update(name.encode() + (_bytes(folder, name) or b""))
    return digest.digest()


def _without_reserved(model: Vocabulary) -> Vocabulary:
    return Vocabulary(
        model.label, model.folder, {t: n for t, n in model.numbers.items() if not _RESERVED.search(t)}, model.added
    )


@dataclass(frozen=True)
class Union:
    """The tokens of an output: `numbers` by text. `donor`: whose tokenizer files it has, with the tokens `further` added to it."""

    numbers: Mapping[str, int]
    donor: Vocabulary
    further: Mapping[str, dict[str, Any]]

    @property
    def rows(self) -> int:
        return max(self.numbers.values(), default=-1) + 1

    def files(self, root: Path) -> dict[str, bytes | None]:
        """What the tokenizer's files hold beside a base at `root`; None for those of the base that go. Raises ConfigError."""
        if self.donor.folder == root and not self.further:
            return {}
        found = tokenizer_files(self.donor.folder, root)
        if not self.further:
            return found
        content = found.get("tokenizer.json")
        if content is None:
            content = _bytes(self.donor.folder, "tokenizer.json")
        if content is None:
            raise ConfigError(
                f"{self.donor.folder}: {len(self.further)} tokens of the experts (such as {shown(next(iter(self.further)))}) are to be added to its"
                " tokenizer, which takes a tokenizer.json. Save the tokenizer in that form (save_pretrained of the fast one)."
            )
        whole = json.loads(content)
        whole["added_tokens"] = [*(whole.get("added_tokens") or []), *self.further.values()]
        found["tokenizer.json"] = (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()
        config = found.get("tokenizer_config.json") or _bytes(self.donor.folder, "tokenizer_config.json")
        if config is not None and "added_tokens_decoder" in (parsed := json.loads(config)):
            for entry in self.further.values():
                parsed["added_tokens_decoder"][str(entry["id"])] = {
                    key: value for key, value in entry.items() if key != "id"
                }
            found["tokenizer_config.json"] = (json.dumps(parsed, indent=2, ensure_ascii=False) + "\n").encode()
        return found


def tokenizer_files(folder: Path, root: Path) -> dict[str, bytes | None]:
    """The files of the tokenizer in `folder`, in the place of those beside a base at `root`."""
    if folder == root:
        return {}
    gone = {path.name: None for path in root.iterdir() if any(fnmatchcase(path.name, own) for own in _FILES)}
    return gone | {
        path.name: _bytes(folder, path.name)
        for path in folder.iterdir()
        if any(fnmatchcase(path.name, own) for own in _FILES)
    }


def _bytes(folder: Path, name: str) -> bytes | None:
    return read_bytes(contained(folder, name, asked_by=str(folder))) if (folder / name).exists() else None


def union_of(models: Sequence[Vocabulary]) -> Union:
    """All tokens of all models, by their texts. The first that has all of them gives the tokenizer; else the first model does, and tokens that others
    have added are added to it, under their own numbers where those are free. Does not depend on the order of the models after the first.

    Raises ConfigError where a tokenizer's own vocabulary has what the first has not: those are no tokens that were added.
    """
    first = models[0]
    wanted = {text for model in models for text in model.numbers}
    agreeing = conflict(models) is None
    for model in models:
        if wanted <= set(model.numbers) and (agreeing or model is first):
            return Union(model.numbers, model, {})
    numbers, further = dict(first.numbers), {}
    lacking = sorted((min(m.numbers[t] for m in models if t in m.numbers), t) for t in wanted - set(numbers))
    taken = set(numbers.values())
    for number, text in lacking:
        entry = next((model.added[text] for model in models if text in model.added), None)
        if entry is None:
            model = next(m for m in models if text in m.numbers)
            raise ConfigError(
                f"{model.label}: its tokenizer is of another vocabulary than that of {first.label}: {len(lacking)} tokens, such as {shown(text)}, are"
                " not there, and were not added to it. Bring the models to one tokenizer first, or keep the embeddings from the base (keep_base)."
            )
        # Without a gap: tokenizers number what is added one after the other.
        free = next(i for i in range(first.rows, first.rows + len(lacking) + 1) if i not in taken)
        own = number if number not in taken and number < free else free
        taken.add(own)
        numbers[text] = own
        further[text] = {**_PLAIN, **entry, "id": own}
    return Union(numbers, first, further)


_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def check_special(config: Mapping[str, Any] | None, where: str, rows: int) -> None:
    """Raise ConfigError where a config names a token beyond the `rows` that are left: the model would not load, or not stop."""
    for key, value in _numbers(config or {}):
        if key.endswith(("_token_id", "_token_index")) and value >= rows:
            raise ConfigError(
                f"vocabulary: crop leaves {rows} tokens, and {where} has {key} = {value}. Say `vocabulary: pad`, which keeps all tokens, or"
                " correct the config of the base."
            )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        for own in value if isinstance(value, list) else [value]:
            if type(own) is int:
                yield str(key), own

"""Models of unequal vocabularies brought to one: by the rows' numbers where every number is one token, else by the tokens' texts."""

from __future__ import annotations

from collections.abc import Sequence

from bmm_engine.checkpoint.compose import root_checkpoint
from bmm_engine.checkpoint.guard import read_json_object
from bmm_engine.checkpoint.rows_by_text import fit_by_text
from bmm_engine.checkpoint.source import TensorSource
from bmm_engine.checkpoint.tokens import Union, Vocabulary, check_special, conflict, described, union_of
from bmm_engine.checkpoint.vocabulary import Reader, ResizedSource, fit_vocabulary, is_vocabulary_tensor
from bmm_engine.errors import ConfigError


def unequal_tensors(
    base: TensorSource, readers: Sequence[Reader], merged: Sequence[str], uneven: Sequence[str], mode: str
) -> list[str]:
    """The tensors whose rows are brought to one vocabulary: those that differ in rows, and all of a vocabulary where its tokens differ by text."""
    known = _vocabularies(base, readers)
    if mode == "pad" and known and conflict(known) is not None:
        return [n for n in merged if n in uneven or _counts_tokens(base, readers, n)]
    return list(uneven)


def _counts_tokens(base: TensorSource, readers: Sequence[Reader], name: str) -> bool:
    return is_vocabulary_tensor(base, name) and all(is_vocabulary_tensor(r.source, r.names[name]) for r in readers)


def fit(
    base: TensorSource, readers: Sequence[Reader], names: Sequence[str], mode: str
) -> tuple[TensorSource, list[TensorSource]]:
    """Views that agree in the rows of the tensors `names`, and, of the base's, in the tokenizer. Where a tokenizer is not known in text, the rows'
    numbers have to tell. Raises ConfigError for tokens that cannot be brought together."""
    known = _vocabularies(base, readers)
    if mode == "crop":
        return _cropped(base, readers, names, known)
    if not known:
        return fit_vocabulary(base, readers, names, mode)
    union = union_of(known)
    if conflict(known) is None and not union.further:
        fitted, views = fit_vocabulary(base, readers, names, mode)
        assert isinstance(fitted, ResizedSource)
        fitted.tokenizer = union
        return fitted, views
    return fit_by_text(base, readers, names, union, known)


def _cropped(
    base: TensorSource, readers: Sequence[Reader], names: Sequence[str], known: Sequence[Vocabulary]
) -> tuple[TensorSource, list[TensorSource]]:
    fitted, views = fit_vocabulary(base, readers, names, "crop")
    rows = min(fitted.spec(n).shape[0] for n in names)
    root = root_checkpoint(base)
    if fitted.config is not base.config:
        check_special(base.config, f"the config of {base.label}", rows)
        file = None if root is None else root.path / "generation_config.json"
        if file is not None and file.is_file():
            check_special(read_json_object(file), str(file), rows)
    if known and (found := conflict(known, rows)) is not None:
        raise ConfigError(
            f"The tokenizers differ: {described(found)}, so one row of the embeddings would be merged of two tokens. `vocabulary: pad` matches the"
            " rows by the tokens' texts."
        )
    if known:
        donor = next((own for own in known if own.rows <= rows), None)
        if donor is None:
            raise ConfigError(
                f"vocabulary: crop leaves {rows} tokens, and every tokenizer has more ({min(own.rows for own in known)} at the least), whose last"
                " ones would have no row. Say `vocabulary: pad`, which keeps all tokens."
            )
        assert isinstance(fitted, ResizedSource)
        fitted.tokenizer = Union(donor.numbers, donor, {})
    return fitted, views


def _vocabularies(base: TensorSource, readers: Sequence[Reader]) -> list[Vocabulary]:
    """Of base and experts; none where one is not known."""
    found = [Vocabulary.of(source) for source in (base, *(reader.source for reader in readers))]
    return [own for own in found if own is not None] if None not in found else []

"""Heads that are the embeddings in one model and a tensor of its own in another: then the output has one of its own, so that none is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmm_engine.checkpoint import TensorSource
from bmm_engine.checkpoint.config_differences import config_differences
from bmm_engine.checkpoint.ties import equal_tensors
from bmm_engine.checkpoint.untied import UntiedSource, untied_config
from bmm_engine.merging.advice import no_head
from bmm_engine.merging.matching import Matcher, source_naming
from bmm_engine.models.naming import Naming


def with_own_heads(
    base: TensorSource, experts: Sequence[TensorSource], naming: Naming | None
) -> tuple[TensorSource, tuple[str, ...]]:
    """The base with a tensor of its own for each tied name that some expert has trained apart, and a note on each. The config then says that nothing
    is tied, as it does where the base's own files hold two tensors that its architecture would tie. Raises `MissingTensorError`."""
    apart: dict[str, str] = {}
    for source in experts:
        for alias in _trained_apart(base, source, naming):
            apart.setdefault(alias, source.label)
    if not apart and not _stored_apart(base, naming):
        return base, ()
    notes = tuple(
        f"{label} has a tensor {alias!r} of its own, which is {base.aliases[alias]!r} in {base.label}: the output gets one of its own too, so that"
        " it is not lost."
        for alias, label in apart.items()
    )
    config = _config(base)
    if config is None:  # it does not say what is tied
        return UntiedSource(base, apart, base.config) if apart else base, notes
    view = UntiedSource(base, apart, config)
    untied = source_naming(view)
    if untied is None:
        return view, notes
    # What such a config ties no longer is a tensor of its own, too.
    names = untied.known(base.aliases)
    own = [alias for alias in base.aliases if alias in apart or names.get(alias, alias) not in untied.ties]
    return UntiedSource(base, own, config), notes


def _trained_apart(base: TensorSource, source: TensorSource, naming: Naming | None) -> list[str]:
    """The base's tied names that an expert stores as a tensor of its own, beside the one that they are tied to, and with other values."""
    if not base.aliases:
        return []
    names = dict.fromkeys((*base.names(), *base.aliases))
    own = Matcher(source, naming).match(tuple(names))
    found = []
    for alias, holder in base.aliases.items():
        one, other = own.get(alias), own.get(holder)
        if one is None and other is not None and _should_have(source, alias, naming):
            raise no_head(base, source, alias)
        if one is None or other is None:
            continue
        one, other = source.aliases.get(one, one), source.aliases.get(other, other)
        if one != other and not equal_tensors(source.spec(one), source.spec(other), source.load):
            found.append(alias)
    return found


def _should_have(source: TensorSource, alias: str, naming: Naming | None) -> bool:
    """Does an expert's own config say that the base's tied name is a tensor of its own?"""
    theirs = source_naming(source)
    live = {} if naming is None else naming.known([alias])
    return theirs is not None and live.get(alias, alias) in theirs.stored - set(theirs.ties)


def _stored_apart(base: TensorSource, naming: Naming | None) -> bool:
    """Do the base's files hold two tensors that its architecture ties?"""
    if naming is None or not naming.ties:
        return False
    held = set(naming.known(base.names()).values())
    return any(tied in held and holder in held for tied, holder in naming.ties.items())


def _config(base: TensorSource) -> dict[str, Any] | None:
    """The base's with nothing tied; None where there is none, or where the key means another thing (T5 scales its outputs by it)."""
    if base.config is None:
        return None
    config = untied_config(base.config)
    changed = config_differences(base.config, config)
    return config if changed and all(one.key.endswith("tie_word_embeddings") for one in changed) else None

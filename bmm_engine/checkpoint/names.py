"""How the name of one tensor differs between checkpoints of an architecture: a prefix more or less, old LayerNorm names."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What transformers itself renames when it loads old BERT files.
_LEGACY = ((re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"), (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"))


def modern_name(name: str) -> str:
    """Without legacy LayerNorm names."""
    for pattern, replacement in _LEGACY:
        name = pattern.sub(replacement, name)
    return name


def change_prefix(prefix: str, name: str) -> str:
    """`name` with "+bert." put before it, with "-bert." taken away, or as it is for ""."""
    if prefix.startswith("+"):
        return prefix[1:] + name
    return name.removeprefix(prefix[1:]) if prefix else name


def prefix_changes(wanted: Iterable[str], known: Iterable[str]) -> list[str]:
    """The changes that may lead from names `wanted` to names `known`, in an order that depends on nothing else; none at all first."""
    return ["", *(f"+{part}" for part in _first_parts(known)), *(f"-{part}" for part in _first_parts(wanted))]


def _first_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.split(".")[0] + "." for name in names if "." in name})

"""How the name of one tensor differs between checkpoints of an architecture that is not known: a prefix more or less."""

from __future__ import annotations

from collections.abc import Iterable


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

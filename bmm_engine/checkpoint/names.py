"""How the name of one tensor differs between checkpoints of an architecture that is not known: a prefix more or less."""

from __future__ import annotations

from collections.abc import Iterable

from bmm_engine.models.names import MOST_PARTS, leading_parts


def change_prefix(prefix: str, name: str) -> str:
    """`name` with "+bert." put before it, with "-bert." taken away, with "-bert.+model." the one in the place of the other, or as it is for ""."""
    if prefix.startswith("+"):
        return prefix[1:] + name
    gone, _, put = prefix[1:].partition("+")
    return put + name.removeprefix(gone) if prefix and name.startswith(gone) else name


def prefix_changes(wanted: Iterable[str], known: Iterable[str]) -> list[str]:
    """The changes that may lead from names `wanted` to names `known`, in an order that depends on nothing else; none at all first, then those of one
    part of a name, then of more."""
    more, fewer = leading_parts(known), leading_parts(wanted)
    changes = [""]
    for count in range(1, MOST_PARTS + 1):
        changes += [f"+{part}" for part in more if part.count(".") == count]
        changes += [f"-{part}" for part in fewer if part.count(".") == count]
    return changes


def prefix_exchanges(wanted: Iterable[str], known: Iterable[str]) -> list[str]:
    """The changes of one leading part (or two, three) for another, the shorter ones first."""
    fewer, more = leading_parts(wanted), leading_parts(known)
    pairs = [(gone, put) for gone in fewer for put in more if gone != put]
    return [f"-{gone}+{put}" for gone, put in sorted(pairs, key=lambda pair: sum(one.count(".") for one in pair))]

"""One mutated input, the command that reads it, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class Invalid(Exception):
    """What a strict reader says of a file that nobody may accept."""


class Unjudged(Exception):
    """The oracle cannot tell what the right result would be."""


@dataclass(frozen=True)
class Case:
    """`did`: the mutation, in words. `argv`: of `bmm`. `names`: a message of an error has one of these in it. `judge`: of a command that ended well;
    returns what is wrong with its output, or None, and raises `Unjudged` where it cannot tell. `harmless`: the mutation changes no meaning, so that
    a refusal is a fault too."""

    did: str
    argv: list[str]
    names: tuple[str, ...]
    judge: Callable[[Ended], str | None]
    harmless: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or the signal that ended it, what it printed, and how much memory it held."""

    code: int | None
    signal: int | None
    out: str
    err: str
    peak_bytes: int
    seconds: float


OK, TYPED, UNJUDGED = "ok", "typed error", "unjudged"
RAW, HANG, MEMORY, SILENT = "raw", "hang", "memory", "silent"
LONG, UNNAMED, REFUSED, ORACLE = "long", "unnamed", "refused", "oracle"
GOOD = (OK, TYPED, UNJUDGED)
FAULTS = (RAW, HANG, MEMORY, SILENT, LONG, UNNAMED, REFUSED, ORACLE)


@dataclass(frozen=True)
class Outcome:
    kind: str
    number: int
    what: str
    case: Case
    ended: Ended
    detail: str
    folder: Path

"""Which files of a directory a merge of this engine wrote: what may be replaced, and what belongs to somebody else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from bmm_engine.checkpoint.provenance import RECORD_FILENAME, RECORD_FORMAT
from bmm_engine.checkpoint.sidecars import PATTERNS
from bmm_engine.disk.files import Own, foreign, matches, read_identity

WEIGHTS = r"model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json"
CARD_FILENAME = "README.md"
_is_weights = matches(WEIGHTS)


def written_by(directory: Path) -> Own:
    """What the merge in a directory wrote: the files that its record lists or, of a record without a list, those of the names that merges write."""
    record = read_identity(directory / RECORD_FILENAME, RECORD_FORMAT) or {}
    files = record.get("files")
    if not isinstance(files, list):
        return may_be_written
    return listed_names([RECORD_FILENAME, *(name for name in files if isinstance(name, str))])


def listed_names(files: Iterable[str]) -> Own:
    """Those files, and the folders that they lie in."""
    paths = [PurePosixPath(name) for name in files]
    known = {str(path) for path in paths} | {f"{parent}/" for path in paths for parent in path.parents}
    return lambda name: name in known


def may_be_written(name: str) -> bool:
    """Is it a name that merges write?"""
    fixed = (RECORD_FILENAME, CARD_FILENAME)
    return name in fixed or _is_weights(name) or any(fnmatchcase(name, pattern) for pattern in (*PATTERNS, "*.py"))


def not_of_the_merge(directory: Path) -> list[str]:
    """What lies in a merge's directory that it did not write."""
    return foreign(directory, written_by(directory))


def record_digest(directory: Path) -> str | None:
    """SHA-256 of a merge's record, by which that very merge is known; None where there is none."""
    try:
        return hashlib.sha256((directory / RECORD_FILENAME).read_bytes()).hexdigest()
    except OSError:
        return None


def same_merge(one: Path, other: Path) -> bool:
    """Do the records of two merges agree in all but the time?"""
    records = [read_identity(path / RECORD_FILENAME, RECORD_FORMAT) for path in (one, other)]
    plain = [{key: value for key, value in (record or {}).items() if key != "created"} for record in records]
    return bool(plain[0]) and plain[0] == plain[1]

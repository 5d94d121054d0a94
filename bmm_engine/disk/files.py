"""Files and folders of this engine's own: told by what they hold, replaced whole, removed so that a kill leaves nothing in the way.

What is not known as ours is never deleted: every removal goes entry by entry, by the names that we write, and never through a link.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Is an entry of a folder ours? By its path within the folder, with slashes; that of a folder ends in one.
Own = Callable[[str], bool]

_MOST_IDENTITY_BYTES = 256 * 2**20
_REMOVING = "removing"


def matches(pattern: str) -> Own:
    """Entries whose whole path matches a regular expression."""
    compiled = re.compile(pattern)
    return lambda name: compiled.fullmatch(name) is not None


def read_identity(path: Path, format_name: str) -> dict[str, Any] | None:
    """The mapping in a JSON file that says `"format": format_name`; None for anything else, a link or another special file included."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_IDENTITY_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("format") == format_name else None


def is_folder(path: Path) -> bool:
    """Is it a folder itself, no link to one?"""
    return path.is_dir() and not path.is_symlink()


def foreign(folder: Path, own: Own) -> list[str]:
    """What in a folder is not ours, in order: files and folders of other names, links, special files."""
    found: list[str] = []
    _look(folder, "", own, found)
    return sorted(found)


def named(entries: Sequence[str], most: int = 3) -> str:
    """A few of them, for a message."""
    shown = [name if len(name) <= 80 else f"{name[:77]}..." for name in entries[:most]]
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(map(repr, shown)) + more


def remove_own(folder: Path, own: Own, last: Iterable[str] = ()) -> bool:
    """Remove what is ours in a folder, and the folder; `last`: names of files that go after all else, so that a kill leaves them.

    False where something stays that is not ours. Harmless where somebody else does the same. Raises `OSError`.
    """
    kept = list(last)
    try:
        _remove_inside(folder, "", lambda name: own(name) and name not in kept)
        with os.scandir(folder) as entries:
            if {entry.name for entry in entries} - {name for name in kept if own(name)}:
                return False
        for name in kept:
            if is_file(folder / name):
                _unlink(folder / name)
        os.rmdir(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # something came in meanwhile
            return False
        raise
    return True


def is_file(path: Path) -> bool:
    """Is it a regular file itself, no link to one?"""
    return path.is_file() and not path.is_symlink()


def retire(folder: Path, own: Own, last: Sequence[str]) -> list[str]:
    """Remove a folder of ours, first from its name, then its content: a kill leaves the whole folder, or `.NAME.removing-...`, for
    `clean_retired`. Where it holds what is not ours nothing is touched, and that is returned. Raises `OSError`."""
    if found := foreign(folder, own):
        return found
    going = folder.with_name(f".{folder.name}.{_REMOVING}-{secrets.token_hex(4)}")
    os.rename(folder, going)
    remove_own(going, own, last)
    return []


def clean_retired(folder: Path, own: Own, last: Sequence[str], is_ours: Callable[[Path], bool]) -> None:
    """Finish what a killed `retire` of a folder of this name began: those that `is_ours` knows, and empty ones. Raises `OSError`."""
    for left in siblings(folder, rf"\.{re.escape(folder.name)}\.{_REMOVING}-[0-9a-f]{{8}}"):
        if is_folder(left) and (is_ours(left) or is_empty(left)):
            remove_own(left, own, last)


def is_empty(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def siblings(path: Path, pattern: str) -> list[Path]:
    """What lies beside a path under a name that matches a regular expression, in order."""
    if not path.parent.is_dir():
        return []
    with os.scandir(path.parent) as entries:
        return sorted(path.with_name(entry.name) for entry in entries if re.fullmatch(pattern, entry.name))


def is_running(pid: int) -> bool:
    """Is there a process of that number on this machine?"""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or replace it, whole or not at all; what killed writers of it left is removed. Raises `OSError`."""
    for left in siblings(path, rf"\.{re.escape(path.name)}\.\d+\.tmp"):
        if not is_running(int(left.name.split(".")[-2])) and is_file(left):
            left.unlink(missing_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staged.write_bytes(content)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _look(folder: Path, within: str, own: Own, found: list[str]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = within + entry.name
            if entry.is_dir(follow_symlinks=False):
                if own(f"{name}/"):
                    _look(Path(entry.path), f"{name}/", own, found)
                else:
                    found.append(f"{name}/")
            elif not entry.is_file(follow_symlinks=False) or not own(name):
                found.append(name)


def _remove_inside(folder: Path, within: str, own: Own) -> None:
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        name, path = within + entry.name, Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            if own(f"{name}/"):
                _remove_inside(path, f"{name}/", own)
                if is_empty(path):
                    os.rmdir(path)
        elif entry.is_file(follow_symlinks=False) and own(name):
            _unlink(path)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)

"""An output directory that appears under its name complete or not at all."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bmm_engine.checkpoint.ownership import listed_names, may_be_written, not_of_the_merge, same_merge, written_by
from bmm_engine.checkpoint.provenance import RECORD_FILENAME, is_merge_directory
from bmm_engine.disk.files import (
    Own,
    foreign,
    is_empty,
    is_file,
    is_folder,
    is_running,
    named,
    remove_own,
    siblings,
)
from bmm_engine.errors import BmmError, OutputExistsError, OutputWriteError

_MARKER = "bmm-partial.json"
_NEXT_MARKER = "bmm-partial.json.next"
STAGE = r"partial-\d+-[0-9a-f]+"  # what follows the destination's name
# The entries of a stage, as a regular expression with a place for those of the directory that is written.
STAGE_ENTRIES = r"bmm-partial\.json|out/(%s)?"
_in_use: set[Path] = set()  # stages of this process: after a restart in a container a dead run may have had our own pid

logger = logging.getLogger(__name__)


class StagedDirectory:
    """`.NAME.partial-PID-RANDOM/out`, renamed to `NAME` by `publish`.

    The stage is a sibling of the destination (a rename must stay on one file system) and also holds the directory that
    is being replaced, so whatever moment a run dies at, the next one can tell what to delete and what to put back. It
    goes last: a dead one without `out` says that the run which wrote the destination was killed before its end. Such a
    run may be repeated, and replaces what it wrote, and only that, also without `overwrite`.
    """

    def __init__(self, destination: str | Path, *, overwrite: bool, needed_bytes: int):
        """Check all that can be known before the work, and remove what dead runs left; creates nothing.

        Raises OutputExistsError (with `overwrite` too, for a merge among files that it did not write), or OutputWriteError
        for a place without write permission or space.
        """
        self.destination = Path(destination).expanduser().resolve()
        self.needed_bytes = needed_bytes
        self._overwrite = overwrite
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._stage = self.destination.parent / f".{self.destination.name}.partial-{token}"
        self.out = self._stage / "out"
        self._old = self._stage / "old"
        self._new_parents: list[Path] = []
        with self.reporting():
            self._unfinished = clean_stages(self.destination)
            self._check_destination()
            anchor = next(parent for parent in self.destination.parents if parent.exists())
            if not os.access(anchor, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
                raise OSError(errno.EROFS if _read_only(anchor) else errno.EACCES, "no write permission", str(anchor))
            if shutil.disk_usage(anchor).free < needed_bytes:
                raise OSError(errno.ENOSPC, "not enough space", str(anchor))

    def create(self) -> None:
        with self.reporting():
            missing = [parent for parent in self.destination.parents if not parent.exists()]
            for parent in reversed(missing):
                parent.mkdir(exist_ok=True)
                self._new_parents.append(parent)
            _in_use.add(self._stage)
            self._stage.mkdir()
            (self._stage / _MARKER).write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}))
            self.out.mkdir()

    def claim(self, names: Iterable[str]) -> None:
        """Write down, before they are written, files of names that merges do not write always: by that the next run knows them for ours."""
        entry = {"pid": os.getpid(), "host": platform.node(), "files": list(names)}
        following = self._stage / _NEXT_MARKER
        following.write_text(json.dumps(entry))
        sync_path(following)
        os.replace(following, self._stage / _MARKER)

    def publish(self, then: Callable[[], None] = lambda: None) -> Path:
        """Rename to the destination; if that fails, `discard` puts back what it replaces. Raises OutputExistsError.

        `then`: what is to be done before the run counts as finished, once the destination has its name.
        """
        with self.reporting():
            sync_path(self.out)
            self._check_destination()
            self._check_repetition()
            try:
                if self._replaces():
                    os.rename(self.destination, self._old)
                os.rename(self.out, self.destination)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise OutputExistsError(
                        f"{self.destination}: was created by someone else meanwhile; choose another path"
                    ) from error
                raise
            sync_path(self.destination.parent)
        self._new_parents.clear()
        then()
        self._forget_unfinished()
        self._remove_stage()
        return self.destination

    def discard(self) -> None:
        """Undo what is not finished: put back an earlier merge, remove the stage and the parents made for it.

        Safe to call at any time, more than once.
        """
        self._remove_stage()
        for parent in reversed(self._new_parents):
            try:
                parent.rmdir()
            except OSError:  # somebody else uses it by now
                break
        self._new_parents.clear()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Turn an OSError of the output side into an OutputWriteError with sizes, after removing the stage."""
        try:
            yield
        except BmmError:
            raise
        except OSError as error:
            free = _free_bytes(self.destination)
            self.discard()
            raised = OutputWriteError(
                f"{self.destination}: cannot be written ({error.strerror or error}: {error.filename or self._stage}); "
                f"it needs {self.needed_bytes} bytes, {free} are free there; free some space, change the permissions "
                "or choose another path"
            )
            raised.errno = error.errno
            raise raised from error

    def _check_destination(self) -> None:
        target = self.destination
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
        if not is_merge_directory(target):
            kind = "a directory with other content" if target.is_dir() else "a file"
            raise OutputExistsError(
                f"{target}: exists and is {kind}, not a merge written by this engine; choose another path"
            )
        if not self._overwrite and not self._unfinished:
            raise OutputExistsError(_earlier(target))
        if theirs := not_of_the_merge(target):
            raise OutputExistsError(
                f"{target}: holds, beside an earlier merge, what that did not write and replacing it would remove: "
                f"{named(theirs)}; move it elsewhere, or choose another path"
            )

    def _check_repetition(self) -> None:
        """Without `overwrite` a merge is replaced only by itself: its run was killed before its end, and was repeated."""
        if self._replaces() and not self._overwrite and not same_merge(self.out, self.destination):
            self._forget_unfinished()
            raise OutputExistsError(_earlier(self.destination))

    def _forget_unfinished(self) -> None:
        """Remove the stages that say that the destination's run was killed before its end."""
        for stage in self._unfinished:
            _try_remove(stage, self.destination)
        self._unfinished = []

    def _replaces(self) -> bool:
        return self.destination.exists() and is_merge_directory(self.destination)

    def _remove_stage(self) -> None:
        # What this run wrote a moment ago is all its own.
        _try_remove(self._stage, self.destination, lambda name: True)
        _in_use.discard(self._stage)


def _earlier(target: Path) -> str:
    return f"{target}: holds an earlier merge; pass overwrite=True (--overwrite) to replace it, or choose another path"


def _put_back(stage: Path, destination: Path) -> bool:
    """Undo a replacement that stopped half-way; False when the earlier merge in `stage` would be lost with it."""
    old = stage / "old"
    if old.exists() and (stage / "out").exists():
        if destination.exists():
            logger.warning("%s: exists, so the earlier merge that it displaced is kept as %s", destination, old)
            return False
        os.rename(old, destination)
    return True


def clean_stages(destination: Path) -> list[Path]:
    """Remove the stages that dead processes of this host left for `destination`, undoing half-done replacements.

    Those stay, and are returned, which say that the merge in `destination` was the last that their process did.
    """
    unfinished = []
    for stage in siblings(destination, rf"(?s)\.{re.escape(destination.name)}\.partial-.*"):
        if stage in _in_use or not is_folder(stage):
            continue
        try:
            if not _is_dead(stage):
                continue
            if not (stage / "out").exists() and is_merge_directory(destination):
                unfinished.append(stage)
            else:
                _try_remove(stage, destination)
        except FileNotFoundError:  # another writer is removing it too
            continue
    return unfinished


def _try_remove(stage: Path, destination: Path, written: Own = may_be_written) -> None:
    """Remove a stage, after what must be put back; what is not ours in it is kept, and so is a merge that would be lost."""
    try:
        claimed = listed_names(_claimed(stage))
        if (
            is_folder(stage)
            and _put_back(stage, destination)
            and not _remove_tree(stage, lambda name: written(name) or claimed(name))
        ):
            logger.warning("%s: is kept, since something in it was not written by a merge", stage)
    except OSError as error:  # raising here would hide the error that led here
        logger.warning("%s: could not be removed (%s); remove it by hand", stage, error)


def _remove_tree(stage: Path, written: Own) -> bool:
    """False where something stays. The marker goes last: without it nobody would know the rest for ours."""
    out, old = stage / "out", stage / "old"
    if is_folder(out) and not remove_own(out, written):
        return False
    if is_folder(old) and not remove_own(old, written_by(old), (RECORD_FILENAME,)):
        return False
    return remove_own(stage, lambda name: name in (_MARKER, _NEXT_MARKER), (_MARKER,))


def _claimed(stage: Path) -> list[str]:
    """The files that its process wrote down as ours."""
    try:
        files = json.loads((stage / _MARKER).read_text(encoding="utf-8")).get("files", [])
        return [name for name in files if isinstance(name, str)]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def _is_dead(stage: Path) -> bool:
    """Is it the stage of a process of this host that is no more?"""
    try:
        marker = (stage / _MARKER).read_text(encoding="utf-8") if is_file(stage / _MARKER) else ""
        owner = json.loads(marker)
        pid, host = int(owner["pid"]), owner["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return _is_begun(stage) and _owner_is_dead(stage)
    return host == platform.node() and (pid == os.getpid() or not is_running(pid))


def _is_begun(stage: Path) -> bool:
    """Was its process killed before its marker was whole? It holds at most the beginning of one."""
    marker = stage / _MARKER
    if foreign(stage, lambda name: name == _MARKER) or (marker.exists() and marker.stat().st_size > 1000):
        return False
    text = marker.read_bytes() if marker.exists() else b""
    begin = b'{"pid": '
    return text.startswith(begin) or begin.startswith(text)


def _owner_is_dead(stage: Path) -> bool:
    """By the number in its name; an empty folder of another name has no owner."""
    found = re.search(r"\.partial-(\d+)-[0-9a-f]+$", stage.name)
    if found is None:
        return is_empty(stage)
    return int(found[1]) == os.getpid() or not is_running(int(found[1]))


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free


def _read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def sync_path(path: Path) -> None:
    """Have a file, or a directory's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

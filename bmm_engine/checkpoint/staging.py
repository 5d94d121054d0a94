"""An output directory that appears under its name complete or not at all."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bmm_engine.checkpoint.provenance import is_merge_directory
from bmm_engine.errors import BmmError, OutputExistsError, OutputWriteError

_MARKER = "bmm-partial.json"
_in_use: set[Path] = set()  # stages of this process: after a restart in a container a dead run may have had our own pid

logger = logging.getLogger(__name__)


class StagedDirectory:
    """`.NAME.partial-PID-RANDOM/out`, renamed to `NAME` by `publish`.

    The stage is a sibling of the destination (a rename must stay on one file system) and also holds the directory that
    is being replaced, so whatever moment a run dies at, the next one can tell what to delete and what to put back.
    """

    def __init__(self, destination: str | Path, *, overwrite: bool, needed_bytes: int):
        """Check all that can be known before the work, and remove what dead runs left; creates nothing.

        Raises OutputExistsError, or OutputWriteError for a place without write permission or space.
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
            _clean_stale(self.destination)
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

    def publish(self) -> Path:
        """Rename to the destination; if that fails, `discard` puts back what it replaces. Raises OutputExistsError."""
        with self.reporting():
            sync_path(self.out)
            self._check_destination()
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
        if not self._overwrite:
            raise OutputExistsError(
                f"{target}: holds an earlier merge; pass overwrite=True to replace it, or choose another path"
            )

    def _replaces(self) -> bool:
        return self.destination.exists() and is_merge_directory(self.destination)

    def _remove_stage(self) -> None:
        try:
            if self._stage.exists() and _put_back(self._stage, self.destination):
                _remove_tree(self._stage)
        except OSError as error:  # raising here would hide the error that led here
            logger.warning("%s: could not be removed (%s); remove it by hand", self._stage, error)
        _in_use.discard(self._stage)


def _put_back(stage: Path, destination: Path) -> bool:
    """Undo a replacement that stopped half-way; False when the earlier merge in `stage` would be lost with it."""
    old = stage / "old"
    if old.exists() and (stage / "out").exists():
        if destination.exists():
            logger.warning("%s: exists, so the earlier merge that it displaced is kept as %s", destination, old)
            return False
        os.rename(old, destination)
    return True


def _clean_stale(destination: Path) -> None:
    """Remove the stages that dead processes of this host left for `destination`, undoing half-done replacements."""
    prefix = f".{destination.name}.partial-"
    if not destination.parent.is_dir():
        return
    for stage in list(destination.parent.iterdir()):
        if not stage.name.startswith(prefix) or stage in _in_use or not _is_dead(stage / _MARKER):
            continue
        try:
            if _put_back(stage, destination):
                _remove_tree(stage)
        except FileNotFoundError:  # another writer is removing it too
            continue


def _remove_tree(stage: Path) -> None:
    for part in (stage / "out", stage / "old"):  # the marker goes last: without it nobody would know the rest for ours
        if part.exists():
            shutil.rmtree(part)
    shutil.rmtree(stage)


def _is_dead(marker: Path) -> bool:
    try:
        owner = json.loads(marker.read_text())
        pid, host = int(owner["pid"]), owner["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not ours, or being made this moment
    if host != platform.node():
        return False
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


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

"""The lock file of a study: byte 0 is held by the process that drives the search, byte n by participant n."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bmm_engine.errors import StudyBusyError, StudyError
from bmm_engine.locks import LockFile
from bmm_engine.searching.database import BUSY_S

LOCK = "lock"
DRIVER_BYTE = 0
CREATION_BYTE = 2**62  # beyond any participant


class StudyLocks:
    """The lock file as one open study has it: what was acquired here is released when this is closed, or the process dies.

    Raises `StudyError` where the disk has no locks.
    """

    def __init__(self, folder: Path, *, readonly: bool):
        self.folder, self.readonly = folder, readonly
        self._file = _opened(folder, create=not readonly)
        self._taken: set[int] = set()

    def check_writable(self) -> None:
        """Raises `StudyError` where the study may only be looked at."""
        self._writable()

    def acquire(self, byte: int) -> bool:
        """False where anyone holds it, this process included. Raises `StudyError` where the study may only be looked at."""
        file = self._writable()
        try:
            taken = file.acquire(byte)
        except OSError as error:
            raise _no_locks(self.folder, error) from error
        if taken:
            self._taken.add(byte)
        return taken

    def release(self, byte: int) -> None:
        """Harmless where it was not acquired here."""
        if self.holds(byte) and self._file is not None:
            self._taken.discard(byte)
            self._file.release(byte)

    def holds(self, byte: int) -> bool:
        """Was it acquired here, and not released?"""
        return byte in self._taken

    def holder(self, byte: int) -> int | None:
        """As `LockFile.holder`; None too where there is no lock file, or this is closed."""
        return None if self._file is None else self._file.holder(byte)

    def close(self) -> None:
        """Harmless when repeated."""
        file, self._file = self._file, None
        if file is not None:
            for byte in self._taken:
                file.release(byte)
            self._taken.clear()
            file.close()

    def _writable(self) -> LockFile:
        if self.readonly or self._file is None:
            raise StudyError(
                f"{self.folder}: this study is {'open for reading only' if self.readonly else 'closed'}. Open it to work on it."
            )
        return self._file


@contextmanager
def creating(folder: Path) -> Iterator[None]:
    """One process at a time creates a study in a folder."""
    locks = _opened(folder, create=True)
    assert locks is not None
    try:
        deadline = time.monotonic() + BUSY_S
        while not locks.acquire(CREATION_BYTE):
            if time.monotonic() > deadline:
                raise StudyBusyError(
                    f"{folder}: process {locks.holder(CREATION_BYTE)} has been creating a study here for {BUSY_S:.0f} s. End it."
                )
            time.sleep(0.01)
        try:
            yield
        finally:
            locks.release(CREATION_BYTE)
    except OSError as error:
        raise error if isinstance(error, StudyError) else _no_locks(folder, error) from error
    finally:
        locks.close()


def _opened(folder: Path, *, create: bool) -> LockFile | None:
    """None where it is absent and not to be created: then nobody works on the study."""
    try:
        return LockFile.open(folder / LOCK, create=create)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _no_locks(folder, error) from error


def _no_locks(folder: Path, error: OSError) -> StudyError:
    return StudyError(
        f"{folder / LOCK}: cannot be locked ({error}). Choose an output on a disk with POSIX locks where files can be written."
    )

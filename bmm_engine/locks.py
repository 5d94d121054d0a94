"""Locks on single bytes of a file, which the kernel drops when their holder dies, however it dies.

POSIX gives such locks to a process, not to a descriptor: closing any descriptor of the file drops all of them, and within a process they do
not conflict. So a process keeps one descriptor for each file, and knows itself which bytes it holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from pathlib import Path

# struct flock: l_type, l_whence, l_start, l_len, l_pid, padded to the alignment of off_t.
_FLOCK = struct.Struct("hhqqi0q")
_guard = threading.RLock()
_opened: dict[tuple[int, int], LockFile] = {}


class LockFile:
    """One lock file in this process; `open` gives the same object for the same file, to be closed as often as opened."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self._descriptor = path, descriptor
        self._held: dict[int, int] = {}  # byte -> the process that took it: a fork inherits this table, but no lock
        self._users = 0

    @classmethod
    def open(cls, path: Path, *, create: bool) -> LockFile:
        """Raises `FileNotFoundError` where it is absent and not to be created, `OSError` where it cannot be opened.

        Opened for reading only where it may not be written: locks can then be looked at, but not taken.
        """
        with _guard:
            try:
                found = _opened.get(_inode(os.stat(path)))
            except FileNotFoundError:
                found = None
            if found is None:
                descriptor = _descriptor(path, create)
                # Another file may have come into its place since the look; closing the new descriptor could drop locks, so it is kept.
                found = _opened.setdefault(_inode(os.fstat(descriptor)), cls(path, descriptor))
            found._users += 1
            return found

    def acquire(self, byte: int) -> bool:
        """Take a byte for this process unless anyone holds it, this process included. Raises `OSError` where locks cannot be taken."""
        with _guard:
            if self._holds(byte):
                return False
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
                raise
            self._held[byte] = os.getpid()
            return True

    def release(self, byte: int) -> None:
        with _guard:
            if self._holds(byte):
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, byte)
                del self._held[byte]

    def holder(self, byte: int) -> int | None:
        """The process that holds a byte, this one included; None if it is free. 0 or less: a process that has no number here (another namespace)."""
        with _guard:
            if self._holds(byte):
                return os.getpid()
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(self._descriptor, fcntl.F_GETLK, asked))
            return None if kind == fcntl.F_UNLCK else pid

    def is_at(self, path: Path) -> bool:
        """Does the file still lie at a path?"""
        try:
            return _inode(os.stat(path)) == _inode(os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """The last user closes the descriptor, and so drops every lock of this process on the file."""
        with _guard:
            self._users -= 1
            if self._users == 0:
                del _opened[_inode(os.fstat(self._descriptor))]
                os.close(self._descriptor)

    def _holds(self, byte: int) -> bool:
        return self._held.get(byte) == os.getpid()


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _descriptor(path: Path, create: bool) -> int:
    flags = os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        return os.open(path, os.O_RDWR | flags, 0o666)
    except OSError as error:
        if create or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return os.open(path, os.O_RDONLY | flags)

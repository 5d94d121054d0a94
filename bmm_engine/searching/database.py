"""The SQLite file of a study: made whole or not at all, checked when opened, and changed in short transactions."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from bmm_engine.disk.files import is_file, siblings
from bmm_engine.errors import StudyBusyError, StudyError, StudyExistsError
from bmm_engine.searching.schema import APPLICATION_ID, FORMAT, SCHEMA, DamagedRow

BUSY_S = 30.0
_BESIDE = r"(-wal|-shm|-journal)?"  # the files that SQLite keeps beside a database


class Database:
    """A connection that threads of one process may share. Raises `StudyError`, where another process keeps the file busy `StudyBusyError`.

    Nothing else in a process may open the file while a connection is open: closing it would drop SQLite's own POSIX locks.
    """

    def __init__(self, path: Path, *, readonly: bool):
        self.path, self.readonly = path, readonly
        self._lock = threading.RLock()
        self._process = os.getpid()
        if not path.is_file():
            raise StudyError(f"{path}: there is no study here. Check the path, or start a search that writes one.")
        self._connection: sqlite3.Connection | None = self._open_checked()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One snapshot for all statements inside."""
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, on disk when it is left; nothing of it where an error is raised inside."""
        if self.readonly:
            raise StudyError(f"{self.path}: was opened for reading only. Open it without `readonly` to change it.")
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    def close(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        if os.getpid() != self._process:
            raise StudyError(
                f"{self.path}: was opened by process {self._process}, of which this is a fork. Open the study anew here."
            )
        with self._lock, _typed(self.path):
            if self._connection is None:
                raise StudyError(f"{self.path}: this study is closed. Open it again.")
            self._connection.execute(begin)
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite has rolled back by itself after some errors
                    self._connection.execute("ROLLBACK")
                raise

    def _open_checked(self) -> sqlite3.Connection:
        with _typed(self.path):
            if not self.readonly:
                return self._connect("mode=rw")
            try:
                return self._connect("mode=ro")
            except sqlite3.OperationalError:
                if not self._lies_still():
                    raise
            # Nothing can be written here, not even SQLite's index of its log; but without a log, the file is all there is.
            return self._connect("mode=ro&immutable=1")

    def _connect(self, options: str) -> sqlite3.Connection:
        address = f"{self.path.resolve().as_uri()}?{options}"
        connection = sqlite3.connect(address, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            _check(connection, self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _lies_still(self) -> bool:
        log = self.path.with_name(f"{self.path.name}-wal")
        return not os.access(self.path.parent, os.W_OK) and (not log.exists() or log.stat().st_size == 0)


def create_database(path: Path, fill: Callable[[sqlite3.Connection], None]) -> None:
    """Make the file with its tables and what `fill` writes. A kill leaves nothing at `path`, or all of it.

    The caller sees to it that no other process does the same at the same time. Raises `StudyExistsError`, `StudyError`.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists():
            raise StudyExistsError(
                f"{path}: there is a study here already. Open it, choose another output, or remove the folder."
            )
        # Of a creation that was killed; and the log of a database that is gone, which SQLite would apply to the new one.
        for left in siblings(path, rf"(\.{re.escape(path.name)}\.\d+\.tmp|{re.escape(path.name)}(?=-)){_BESIDE}"):
            if is_file(left):
                left.unlink(missing_ok=True)
        with _typed(path), closing(sqlite3.connect(unfinished, isolation_level=None)) as connection:
            connection.executescript(f"BEGIN; {SCHEMA}")
            fill(connection)
            connection.execute("COMMIT")
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise StudyError(
                    f"{path}: SQLite cannot keep a write-ahead log here (mode {mode!r}). Choose an output on a local disk."
                )
        _sync(unfinished)
        os.rename(unfinished, path)
        _sync(path.parent)
    except OSError as error:
        if isinstance(error, StudyExistsError):
            raise
        raise StudyError(
            f"{path}: the study cannot be written ({error}). Choose an output where files can be written."
        ) from error
    finally:
        for left in siblings(path, rf"{re.escape(unfinished.name)}{_BESIDE}"):
            left.unlink(missing_ok=True)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise StudyError(
            f"{path}: is an SQLite database, but no study of this engine. Choose another output, or remove the folder."
        )
    if version != FORMAT:
        raise StudyError(
            f"{path}: the study has format {version}, this version of the engine reads format {FORMAT}. Use the version that wrote it, or"
            " choose another output."
        )
    (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(" ".join(found.split()))


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    """SQLite's errors as typed ones that say what to do."""
    try:
        yield
    except DamagedRow as error:
        raise StudyError(
            f"{path}: {error}; it was changed by something else. Restore it from a copy, or remove the folder to start anew."
        ) from error
    except sqlite3.OperationalError as error:
        text = str(error)
        if "locked" in text or "busy" in text:
            raise StudyBusyError(
                f"{path}: another process has kept it busy for {BUSY_S:.0f} s ({text}). Try again when it has ended."
            ) from error
        raise StudyError(
            f"{path}: cannot be used ({text}). See to the disk's space and the folder's permissions; to read a study where nothing can be"
            " written, copy its folder."
        ) from error
    except sqlite3.DatabaseError as error:
        if isinstance(error, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):
            raise  # a mistake of the caller's, not of the file
        raise StudyError(
            f"{path}: is damaged, or no database ({error}). Restore it from a copy, or remove the folder to start anew."
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)

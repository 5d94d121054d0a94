"""Who works on a study that another process drives: rows of its table `participants`, alive while they hold their byte of the lock file."""

from __future__ import annotations

import os
import socket
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from bmm_engine.errors import StudyError
from bmm_engine.searching.database import Database
from bmm_engine.searching.schema import Trial, now, select_trials
from bmm_engine.searching.study_locks import DRIVER_BYTE, LOCK, StudyLocks


@dataclass(frozen=True)
class Participant:
    """A process that takes trials of a study which another drives. A context manager: leaving it gives up what it still has."""

    id: int
    pid: int
    host: str
    since: str  # UTC, ISO 8601
    _leave: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """What its trials have as their `worker`."""
        return f"worker-{self.id}"

    def leave(self) -> None:
        """What it runs becomes an orphan. Harmless when repeated."""
        self._leave()

    def __enter__(self) -> Participant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


class Participants:
    """Those of one open study."""

    def __init__(self, database: Database, locks: StudyLocks):
        self._database, self._locks = database, locks

    def join(self) -> Participant:
        """Register this process."""
        self._locks.check_writable()
        host, since = socket.gethostname(), now()
        byte = DRIVER_BYTE
        try:
            with self._database.writing() as connection:
                self.note_the_dead(connection)
                row = connection.execute(
                    "INSERT INTO participants (pid, host, since) VALUES (?, ?, ?)", (os.getpid(), host, since)
                )
                assert row.lastrowid is not None
                # The lock comes before anyone can see the row: who is registered and holds none is dead.
                if not self._locks.acquire(row.lastrowid):
                    raise StudyError(
                        f"{self._locks.folder}: byte {row.lastrowid} of {LOCK} is locked, but by no participant. End what holds it."
                    )
                byte = row.lastrowid
        except BaseException:
            if byte != DRIVER_BYTE:
                self._locks.release(byte)
            raise
        return Participant(byte, os.getpid(), host, since, lambda: self._leave(byte))

    def alive(self) -> list[Participant]:
        """In the order of joining."""
        with self._database.reading() as connection:
            return self._alive(connection)

    def orphans(self) -> list[Trial]:
        """Trials that run with a participant that is dead or has left; of any other worker, when no driver is alive."""
        with self._database.reading() as connection:
            running = select_trials(connection, "state = 'running'")
            # Asked of the kernel after the trials were read: who has died since is found the next time.
            known = {f"worker-{row['id']}" for row in connection.execute("SELECT id FROM participants")}
            alive = {p.name for p in self._alive(connection)} if running else set()
        driven = self._locks.holder(DRIVER_BYTE) is not None
        return [t for t in running if (t.worker not in alive if t.worker in known else not driven)]

    def note_the_dead(self, connection: sqlite3.Connection) -> None:
        """So that nobody asks after them again."""
        alive = {p.id for p in self._alive(connection)}
        rows = connection.execute("SELECT id FROM participants WHERE ended IS NULL").fetchall()
        gone = [(now(), row["id"]) for row in rows if row["id"] not in alive]
        connection.executemany("UPDATE participants SET ended = ? WHERE id = ?", gone)

    def _alive(self, connection: sqlite3.Connection) -> list[Participant]:
        rows = connection.execute("SELECT id, pid, host, since FROM participants WHERE ended IS NULL ORDER BY id")
        return [Participant(*row) for row in rows.fetchall() if self._locks.holder(row["id"]) is not None]

    def _leave(self, byte: int) -> None:
        if not self._locks.holds(byte):
            return
        with self._database.writing() as connection:
            connection.execute("UPDATE participants SET ended = ? WHERE id = ?", (now(), byte))
        self._locks.release(byte)

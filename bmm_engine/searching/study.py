"""A study on disk: what a search is, its trials, and who works on it. Any process may be killed at any moment; what was returned from is there.

A study is a folder with `trials.sqlite` and `lock` (see `study_locks`).
"""

from __future__ import annotations

import math
import os
import socket
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from bmm_engine.errors import ConfigError, StudyBusyError, StudyError, StudyExistsError
from bmm_engine.evaluators.scores import Score
from bmm_engine.searching.canonical import digest, dumps, first_difference, plain
from bmm_engine.searching.database import Database, create_database
from bmm_engine.searching.participants import Participant, Participants
from bmm_engine.searching.schema import IN_FLIGHT, KINDS, TOLD, Trial, insert_scores, loaded, now, select_trials
from bmm_engine.searching.study_locks import DRIVER_BYTE, StudyLocks, creating

DATABASE = "trials.sqlite"


class Study:
    """A study that is open; a context manager. Threads may share it, forks may not.

    Every method that changes something is one transaction, on disk when it returns. All raise `StudyError` where the database cannot be used,
    the trial does not exist or is in no state for what is asked, and `StudyBusyError` where other processes block it for 30 s.
    Attributes: `folder`; `readonly`; `record`, JSON values that say what the study is, fixed when it was made.
    """

    def __init__(self, folder: Path, *, readonly: bool):
        self.folder, self.readonly = folder, readonly
        with ExitStack() as undo:
            self._database = undo.enter_context(closing(Database(folder / DATABASE, readonly=readonly)))
            self._locks = undo.enter_context(closing(StudyLocks(folder, readonly=readonly)))
            self._participants = Participants(self._database, self._locks)
            with self._database.reading() as connection:
                row = connection.execute("SELECT value FROM meta WHERE key = 'record'").fetchone()
                record = None if row is None else loaded(row["value"], "its record")
            if not isinstance(record, dict) or not isinstance(record.get("identity"), dict):
                raise StudyError(
                    f"{folder / DATABASE}: does not say what the study is; it was changed by something else. Restore it from a copy, or remove"
                    " the folder to start anew."
                )
            self.record: dict[str, Any] = record
            undo.pop_all()

    @classmethod
    def create(cls, folder: Path | str, record: Mapping[str, Any]) -> Study:
        """A new study; a kill meanwhile leaves none or all of it. `record`: JSON values, among them the dictionary "identity".

        The folder may exist and hold other files. Raises `StudyExistsError`, `StudyError` (cannot be written), `ConfigError` (no JSON values).
        """
        folder = Path(folder)
        if not isinstance(record.get("identity"), Mapping):
            raise ConfigError(
                f"{folder}: the record of a study needs 'identity', a dictionary, but has {record.get('identity')!r}."
            )
        text = dumps(plain(record, "record"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(
                f"{folder}: cannot be made ({error}). Choose an output where folders can be made."
            ) from error

        def fill(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT INTO meta VALUES (?, ?)", [("record", text), ("created_at", dumps(now()))])

        with creating(folder):
            create_database(folder / DATABASE, fill)
        return cls(folder, readonly=False)

    @classmethod
    def open(cls, folder: Path | str, readonly: bool = False) -> Study:
        """The study in `folder`. Raises `StudyError` where there is none, or its database is damaged or of another format.

        `readonly` works beside a running search, and in places that cannot be written.
        """
        return cls(Path(folder), readonly=readonly)

    @classmethod
    def open_or_create(cls, folder: Path | str, record: Mapping[str, Any]) -> Study:
        """Open, or create where there is none. Raises `ConfigError` where the study's "identity" is another than the record's."""
        if not (Path(folder) / DATABASE).exists():
            try:
                return cls.create(folder, record)
            except StudyExistsError:
                pass  # another process was faster
        study = cls.open(folder)
        try:
            study.check_identity(record["identity"])
        except BaseException:
            study.close()
            raise
        return study

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Raises `ConfigError`, naming the first key that differs and both values, unless it equals the record's "identity" as JSON."""
        if found := first_difference(self.record["identity"], plain(identity, "identity")):
            key, there, here = found
            raise ConfigError(
                f"{self.folder}: holds a study of another search; {key!r} is {there} there and {here} here. Choose another output, or remove the"
                " folder to start anew."
            )

    def close(self) -> None:
        """Leaves whatever was joined or driven. Harmless when repeated."""
        self._locks.close()
        self._database.close()

    def __enter__(self) -> Study:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Trials

    def add(self, kind: str, parameters: Mapping[str, Any], *, waiting: bool, worker: str | None = None) -> Trial:
        """A new trial, which waits for a worker or runs at once. Raises `ConfigError` unless `parameters` are JSON values (infinity as "inf")."""
        if kind not in KINDS or (waiting and worker is not None):
            raise StudyError(
                f"{self.folder}: a trial of kind {kind!r} that waits: {waiting}, worker {worker!r}; kinds are {', '.join(KINDS)}."
            )
        values = plain(parameters, "parameters", finite=True)
        asked_at = now()
        with self._database.writing() as connection:
            (number,) = connection.execute("SELECT coalesce(max(number) + 1, 0) FROM trials").fetchone()
            connection.execute(
                "INSERT INTO trials (number, kind, parameters, digest, seed, state, worker, ask_event, asked_at, started_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    number,
                    kind,
                    dumps(values, ordered=True),
                    digest(values),
                    self.record.get("seed"),
                    "waiting" if waiting else "running",
                    worker,
                    _next_event(connection),
                    asked_at,
                    None if waiting else asked_at,
                ),
            )
            return _one(select_trials(connection, "number = ?", (number,)))

    def start(self, number: int, worker: str) -> bool:
        """Waiting to running. False where it no longer waits: another worker took it."""
        with self._database.writing() as connection:
            return self._start(connection, number, worker)

    def claim(self, worker: Participant | str) -> Trial | None:
        """The lowest trial that waits, which now runs with `worker`; None if none waits. No two workers get the same."""
        lowest = "SELECT min(number) FROM trials WHERE state = 'waiting'"
        with self._database.reading() as connection:  # who polls does not hold up who writes
            if connection.execute(lowest).fetchone()[0] is None:
                return None
        with self._database.writing() as connection:
            (number,) = connection.execute(lowest).fetchone()
            if number is None:
                return None
            self._start(connection, number, worker if isinstance(worker, str) else worker.name)
            return _one(select_trials(connection, "number = ?", (number,)))

    def evaluated(
        self,
        number: int,
        scores: Mapping[str, Score],
        seconds: float,
        evaluation_seconds: float,
        worker: str | None,
        pruned_after: str | None = None,
    ) -> bool:
        """Keep the outcome of a trial, to be told. False, and nothing kept, where `worker` no longer has it: it was given back meanwhile."""
        with self._database.writing() as connection:
            if not self._end(connection, number, worker, float(seconds), float(evaluation_seconds), pruned_after, None):
                return False
            insert_scores(connection, number, scores)
            return True

    def failed(self, number: int, error: str, worker: str | None) -> bool:
        """Keep that a trial ended in an error: it is "evaluated" with `error` and no scores, to be told as failed. False as in `evaluated`."""
        with self._database.writing() as connection:
            return self._end(connection, number, worker, None, None, None, _storable(error))

    def tell(
        self,
        number: int,
        value: float | None,
        state: Literal["finished", "pruned", "failed"] = "finished",
        error: str | None = None,
    ) -> None:
        """Set the objective and the next event. Raises `StudyError` if it was told before, or is to be finished or pruned but not evaluated."""
        if state not in TOLD or (state == "finished" and value is None) or (value is not None and math.isnan(value)):
            raise StudyError(
                f"{self.folder}: trial {number} cannot be told {state!r} with value {value}; finished trials need a number."
            )
        from_states = IN_FLIGHT if state == "failed" else ("evaluated",)
        with self._database.writing() as connection:
            done = connection.execute(
                "UPDATE trials SET state = ?, value = ?, tell_event = ?, error = coalesce(?, error), finished_at = coalesce(finished_at, ?)"
                f" WHERE number = ? AND state IN ({_marks(from_states)})",
                (
                    state,
                    None if value is None else float(value),
                    _next_event(connection),
                    _storable(error),
                    now(),
                    number,
                    *from_states,
                ),
            ).rowcount
            if not done:
                trial = self._existing(connection, number)
                raise StudyError(f"{self.folder}: trial {number} is {trial.state} and cannot be told {state!r}.")

    def give_back(self, number: int) -> bool:
        """Running to waiting, for another attempt; False if it does not run (any more)."""
        with self._database.writing() as connection:
            done = connection.execute(
                "UPDATE trials SET state = 'waiting', worker = NULL, started_at = NULL, attempts = attempts + 1"
                " WHERE number = ? AND state = 'running'",
                (number,),
            ).rowcount
            return self._changed(connection, number, done)

    def trials(self, states: Collection[str] | None = None) -> list[Trial]:
        """By number; those in one of `states`, or all."""
        with self._database.reading() as connection:
            if states is None:
                return select_trials(connection)
            return select_trials(connection, f"state IN ({_marks(states)})", tuple(states))

    def trial(self, number: int) -> Trial:
        with self._database.reading() as connection:
            return self._existing(connection, number)

    def same(self, parameters: Mapping[str, Any]) -> Trial | None:
        """The first trial with equal parameters that is finished, or in flight without an error."""
        values = (digest(plain(parameters, "parameters", finite=True)), "finished", *IN_FLIGHT)
        condition = f"digest = ? AND state IN ({_marks(values[1:])}) AND error IS NULL"
        with self._database.reading() as connection:
            return next(iter(select_trials(connection, condition, values)), None)

    def events(self) -> list[tuple[Literal["ask", "tell"], Trial]]:
        """All asks and tells in their order, each with the trial as it is now."""
        found: list[tuple[int, Literal["ask", "tell"], Trial]] = []
        for trial in self.trials():
            found.append((trial.ask_event, "ask", trial))
            if trial.tell_event is not None:
                found.append((trial.tell_event, "tell", trial))
        return [(kind, trial) for _, kind, trial in sorted(found, key=lambda event: event[0])]

    def best(self) -> Trial | None:
        """The finished trial of the highest value; of equals, the one asked for first."""
        condition = "number = (SELECT number FROM trials WHERE state = 'finished' ORDER BY value DESC, number LIMIT 1)"
        with self._database.reading() as connection:
            return next(iter(select_trials(connection, condition)), None)

    # Facts

    def fact(self, key: str) -> Any:
        """What `set_fact` kept, as JSON holds it (infinity and NaN as the texts "inf", "-inf", "nan"); None where nothing was."""
        with self._database.reading() as connection:
            row = connection.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
            return None if row is None else loaded(row["value"], f"the fact {key!r}")

    def set_fact(self, key: str, value: Any) -> None:
        """Keep JSON values under `key`, in the place of what was there."""
        text = dumps(plain(value, key))
        with self._database.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (key, text, now()))

    # Who works on it

    @contextmanager
    def drive(self) -> Iterator[None]:
        """Be the one process that asks and tells. Raises `StudyBusyError` while another is, or another `drive` of this process."""
        if not self._locks.acquire(DRIVER_BYTE):
            pid = self._locks.holder(DRIVER_BYTE)
            who = "this process" if pid == os.getpid() else f"process {pid}" if pid and pid > 0 else "another process"
            raise StudyBusyError(
                f"{self.folder}: {who} drives this search already. Wait until it has ended, or work for it with --join."
            )
        try:
            with self._database.writing() as connection:
                driver = dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now()})
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('driver', ?)", (driver,))
                self._participants.note_the_dead(connection)
            yield
        finally:
            self._locks.release(DRIVER_BYTE)

    def driver_alive(self) -> bool:
        return self._locks.holder(DRIVER_BYTE) is not None

    def join(self) -> Participant:
        """Register this process as a worker; it counts as alive until it leaves, closes the study, or dies."""
        return self._participants.join()

    def participants(self) -> list[Participant]:
        """Workers that are alive, in the order of joining."""
        return self._participants.alive()

    def orphans(self) -> list[Trial]:
        """Trials that run with a worker which is no more: a participant that is dead or has left; of any other worker, when no driver is alive.

        Trials of an earlier driver are not among them while a new one is alive: it gives them back when it begins.
        """
        return self._participants.orphans()

    # Within a transaction

    def _start(self, connection: sqlite3.Connection, number: int, worker: str) -> bool:
        done = connection.execute(
            "UPDATE trials SET state = 'running', worker = ?, started_at = ? WHERE number = ? AND state = 'waiting'",
            (worker, now(), number),
        ).rowcount
        return self._changed(connection, number, done)

    def _end(
        self,
        connection: sqlite3.Connection,
        number: int,
        worker: str | None,
        seconds: float | None,
        evaluation_seconds: float | None,
        pruned_after: str | None,
        error: str | None,
    ) -> bool:
        done = connection.execute(
            "UPDATE trials SET state = 'evaluated', seconds = ?, evaluation_seconds = ?, pruned_after = ?, error = ?, finished_at = ?"
            " WHERE number = ? AND state = 'running' AND worker IS ?",
            (seconds, evaluation_seconds, pruned_after, error, now(), number, worker),
        ).rowcount
        return self._changed(connection, number, done)

    def _changed(self, connection: sqlite3.Connection, number: int, rows: int) -> bool:
        """Was the trial in the state that the change was for? Raises `StudyError` if there is no such trial."""
        if not rows:
            self._existing(connection, number)
        return rows == 1

    def _existing(self, connection: sqlite3.Connection, number: int) -> Trial:
        found = select_trials(connection, "number = ?", (number,))
        if not found:
            raise StudyError(f"{self.folder}: there is no trial {number}.")
        return found[0]


def _next_event(connection: sqlite3.Connection) -> int:
    (last,) = connection.execute(
        "SELECT max(coalesce((SELECT max(ask_event) FROM trials), -1), coalesce((SELECT max(tell_event) FROM trials), -1))"
    ).fetchone()
    return last + 1


def _one(trials: list[Trial]) -> Trial:
    (trial,) = trials
    return trial


def _storable(text: str | None) -> str | None:
    """Messages may name files whose names are no text."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _marks(values: Collection[Any]) -> str:
    return ", ".join("?" * len(values))

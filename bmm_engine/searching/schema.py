"""A study's tables, and trials as rows of them."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from bmm_engine.evaluators.scores import Score
from bmm_engine.searching.canonical import dumps, plain

APPLICATION_ID = 0x424D4D53  # "BMMS", in the file's header: `file` and SQLite see whose it is
FORMAT = 1
KINDS = ("anchor", "default", "proposed")
IN_FLIGHT = ("waiting", "running", "evaluated")
TOLD = ("finished", "pruned", "failed")
SPLIT = "validation"  # what trials are scored on

# REAL columns of scores: NULL is NaN, which SQLite does not store; infinity it does. `rowid` keeps the order in which tasks were scored.
SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL, set_at TEXT NOT NULL);
CREATE TABLE trials (
    number INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN {KINDS}),
    parameters TEXT NOT NULL,
    digest TEXT NOT NULL,
    seed INTEGER,
    state TEXT NOT NULL CHECK (state IN {IN_FLIGHT + TOLD}),
    value REAL,
    seconds REAL,
    evaluation_seconds REAL,
    worker TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    pruned_after TEXT,
    ask_event INTEGER NOT NULL UNIQUE,
    tell_event INTEGER UNIQUE,
    asked_at TEXT NOT NULL,
    started_at TEXT,
    finished_at TEXT,
    CHECK ((tell_event IS NULL) = (state IN {IN_FLIGHT}))
);
CREATE INDEX trials_by_digest ON trials (digest);
CREATE INDEX trials_by_state ON trials (state);
CREATE TABLE scores (
    trial INTEGER NOT NULL REFERENCES trials (number),
    task TEXT NOT NULL,
    split TEXT NOT NULL,
    value REAL,
    samples INTEGER NOT NULL,
    low REAL,
    high REAL,
    metric TEXT NOT NULL,
    details TEXT NOT NULL,
    UNIQUE (trial, task, split)
);
CREATE TABLE participants (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    pid INTEGER NOT NULL,
    host TEXT NOT NULL,
    since TEXT NOT NULL,
    ended TEXT
);
"""


@dataclass(frozen=True)
class Trial:
    """One candidate and what became of it.

    `number`: 0, 1, ... in the order of asking. `state`: "waiting" for a worker, "running", "evaluated" (its scores, or the error that ended it,
    are there, but no value was told), "finished", "pruned" (given up in a race; some of the tasks are scored) or "failed". `value`: the
    objective, higher is better; None until told. `seconds`: of the whole trial, `evaluation_seconds` of them scoring. `attempts`: how often it
    was started and given back. `ask_event`, `tell_event`: one counter, from 0, orders all asks and tells of a study. `started_at`,
    `finished_at`: UTC, ISO 8601.
    """

    number: int
    kind: str
    parameters: dict[str, Any]
    state: str
    scores: dict[str, Score]
    value: float | None
    seconds: float | None
    evaluation_seconds: float | None
    worker: str | None
    attempts: int
    error: str | None
    ask_event: int
    tell_event: int | None
    pruned_after: str | None = None
    started_at: str | None = None
    finished_at: str | None = None


def select_trials(connection: sqlite3.Connection, condition: str = "1", values: tuple[Any, ...] = ()) -> list[Trial]:
    """Trials that fulfil an SQL condition, by number, with their scores. To be called within a transaction: it reads two tables."""
    rows = connection.execute(f"SELECT * FROM trials WHERE {condition} ORDER BY number", values).fetchall()
    scores: dict[int, dict[str, Score]] = {row["number"]: {} for row in rows}
    if len(rows) == 1:  # the common case need not walk the condition twice
        condition, values = "number = ?", (rows[0]["number"],)
    if rows:
        found = connection.execute(
            f"SELECT * FROM scores WHERE split = ? AND trial IN (SELECT number FROM trials WHERE {condition}) ORDER BY trial, rowid",
            (SPLIT, *values),
        )
        for row in found:
            scores[row["trial"]][row["task"]] = _score(row)
    return [_trial(row, scores[row["number"]]) for row in rows]


def insert_scores(connection: sqlite3.Connection, number: int, scores: Mapping[str, Score]) -> None:
    rows = [
        (
            number,
            task,
            SPLIT,
            float(score.value),
            int(score.samples),
            float(score.low),
            float(score.high),
            score.metric,
            dumps(plain(score.details, f"details of task {task!r}")),
        )
        for task, score in scores.items()
    ]
    connection.executemany("INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


def now() -> str:
    """What columns that end in `_at`, `since` and `ended` hold: UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class DamagedRow(ValueError):
    """A row that does not hold what this engine writes; `Database` raises it as a `StudyError` that names the file."""


def loaded(text: Any, where: str) -> Any:
    """The value of a column of JSON text. Raises `DamagedRow`."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DamagedRow(f"{where} is no JSON ({str(error)[:200]})") from error


# What a column holds, beside NULL; SQLite itself takes any type in any column.
_TYPES: dict[str, tuple[type, ...]] = {
    "number": (int,),
    "kind": (str,),
    "state": (str,),
    "value": (int, float),
    "seconds": (int, float),
    "evaluation_seconds": (int, float),
    "worker": (str,),
    "attempts": (int,),
    "error": (str,),
    "pruned_after": (str,),
    "ask_event": (int,),
    "tell_event": (int,),
    "started_at": (str,),
    "finished_at": (str,),
    "samples": (int,),
    "low": (int, float),
    "high": (int, float),
    "metric": (str,),
}


def _column(row: sqlite3.Row, key: str, where: str) -> Any:
    try:
        value = row[key]
    except IndexError:
        raise DamagedRow(f"{where} has no column {key!r}") from None
    if value is not None and not isinstance(value, _TYPES[key]):
        raise DamagedRow(f"{where}: {key} is {str(value)[:100]!r}, of another type than this engine writes")
    if value is not None and key.endswith("_at"):
        try:
            datetime.fromisoformat(str(value))
        except ValueError:
            raise DamagedRow(f"{where}: {key} is {str(value)[:100]!r}, which is no time") from None
    return value


def _score(row: sqlite3.Row) -> Score:
    where = f"the score of trial {row['trial']} on task {str(row['task'])[:100]!r}"
    details = loaded(row["details"], f"{where}: details")
    try:
        numbers = {key: float(value) for key, value in details.items()}
    except (AttributeError, TypeError, ValueError):
        raise DamagedRow(f"{where}: details are no mapping of numbers") from None
    return Score(
        value=_number(_column(row, "value", where)),
        samples=_column(row, "samples", where),
        low=_number(_column(row, "low", where)),
        high=_number(_column(row, "high", where)),
        metric=_column(row, "metric", where),
        details=numbers,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _trial(row: sqlite3.Row, scores: dict[str, Score]) -> Trial:
    where = f"trial {row['number']}"
    own = {key: _column(row, key, where) for key in Trial.__dataclass_fields__ if key not in ("parameters", "scores")}
    parameters = loaded(row["parameters"], f"{where}: parameters")
    if not isinstance(parameters, dict):
        raise DamagedRow(f"{where}: parameters are no mapping")
    return Trial(parameters=parameters, scores=scores, **own)

"""How far each job is that runs in a process of its own: numbers in shared memory, and no lock that one that dies could keep."""

from __future__ import annotations

import ctypes
from multiprocessing.context import BaseContext

from bmm_engine.progress import Listener

_LABEL_BYTES = 160
_UNKNOWN = -1


class _Row(ctypes.Structure):
    _fields_ = (("done", ctypes.c_int64), ("total", ctypes.c_int64), ("label", ctypes.c_char * _LABEL_BYTES))


class Board:
    """One row for each job, which that job's process alone writes, and whether it is too late to begin another.

    A board goes to a process as it is started.
    """

    def __init__(self, jobs: int, context: BaseContext):
        self._closed = context.RawValue(ctypes.c_bool, False)
        self._rows: ctypes.Array[_Row] = context.RawArray(_Row, jobs)

    @property
    def closed(self) -> bool:
        return bool(self._closed.value)

    def close(self) -> None:
        self._closed.value = True

    def writer(self, job: int) -> RowWriter:
        return RowWriter(self._rows[job])

    def read(self) -> dict[str, tuple[int, int | None]]:
        """(done, total) of what is under way, by label. A row read while it is written may show a step of its last label."""
        rows = [(row.label.decode(errors="replace"), row.done, row.total) for row in self._rows]
        return {label: (done, None if total == _UNKNOWN else total) for label, done, total in rows if label}


class RowWriter:
    """The listener in a job's process. Of loops within loops the innermost is shown."""

    def __init__(self, row: _Row):
        self._row = row

    def step(self, label: str, done: int, total: int | None) -> None:
        self._row.done, self._row.total = done, _UNKNOWN if total is None else total
        self._row.label = label.encode()[: _LABEL_BYTES - 1]

    def end(self, label: str) -> None:
        self._row.label = b""


class Reading:
    """Tells a listener what is new on a board."""

    def __init__(self, board: Board, listener: Listener):
        self._board, self._listener = board, listener
        self._shown: set[str] = set()

    def look(self) -> None:
        found = self._board.read()
        for label in self._shown - found.keys():
            self._listener.end(label)
        for label, (done, total) in found.items():
            self._listener.step(label, done, total)
        self._shown = set(found)

"""Says what a long run is doing: bars on a terminal; elsewhere, in a pipe or a file, a line at each stage and every few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bmm_engine.progress import heard_by

if TYPE_CHECKING:
    from rich.console import Console

INTERVAL_S = 10.0


class Narrator:
    """A context in which stages are told. It hears what they track (`progress.heard_by`), in this process and in the demo's workers.

    Away from a terminal no two lines are more than `interval` seconds apart: a thread of its own sees to that, whatever the run is busy with.
    """

    def __init__(self, console: Console, interval: float = INTERVAL_S):
        self.seconds: dict[str, float] = {}  # by stage
        self._console = console
        self._started = time.perf_counter()
        self._view: _Bars | _Lines = _Bars(console) if console.is_terminal else _Lines(self, interval)
        self._stack = ExitStack()

    def __enter__(self) -> Narrator:
        self._stack.enter_context(self._view)
        self._stack.enter_context(heard_by(self._view))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._started

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """One part of the run. Its end is told with the seconds it took, unless it fails."""
        started = time.perf_counter()
        self._view.begin(title)
        try:
            yield
        finally:
            self._view.finish()
        self.seconds[title] = time.perf_counter() - started
        self.say(f"{title}: done in {self.seconds[title]:.1f} s")

    def say(self, line: str) -> None:
        self._view.said()
        self._console.print(f"[{self.elapsed:4.0f} s] {line}", highlight=False, markup=False, soft_wrap=True)

    def show(self, what: Any) -> None:
        """A table, or a closing word: without the time before it."""
        self._view.said()
        self._console.print(what, highlight=False, markup=False)


class _Bars:
    """The stage with a bar for each loop under it."""

    def __init__(self, console: Console):
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[count]}"))
        self._progress = Progress(SpinnerColumn(), *columns, TimeElapsedColumn(), console=console, transient=True)
        self._rows: dict[str, Any] = {}

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, title: str) -> None:
        self._rows[""] = self._progress.add_task(title, total=None, count="")

    def finish(self) -> None:
        for label in list(self._rows):
            self.end(label)

    def said(self) -> None: ...

    def step(self, label: str, done: int, total: int | None) -> None:
        count = f"{done}" if total is None else f"{done}/{total}"
        if label not in self._rows:
            self._rows[label] = self._progress.add_task(f"  {label}", total=total, count=count)
        self._progress.update(self._rows[label], completed=done, count=count)

    def end(self, label: str) -> None:
        if label in self._rows:
            self._progress.remove_task(self._rows.pop(label))


class _Lines:
    """Where the stage is, in a line, whenever nothing else was said for half of the interval: the other half is for a busy machine."""

    def __init__(self, narrator: Narrator, interval: float):
        self._narrator, self._pause = narrator, interval / 2
        self._lock = threading.Lock()
        self._title, self._began = "", 0.0
        self._loops: dict[str, tuple[int, int | None]] = {}
        self._spoken = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._beat, name="narrator", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._spoken.set()
        self._thread.join()

    def begin(self, title: str) -> None:
        with self._lock:
            self._title, self._began = title, time.perf_counter()
        self._narrator.say(title)

    def finish(self) -> None:
        with self._lock:
            self._title = ""
            self._loops.clear()

    def said(self) -> None:
        self._spoken.set()

    def step(self, label: str, done: int, total: int | None) -> None:
        with self._lock:
            self._loops[label] = done, total

    def end(self, label: str) -> None:
        with self._lock:
            self._loops.pop(label, None)

    def _beat(self) -> None:
        while not self._ended:
            if self._spoken.wait(self._pause):
                self._spoken.clear()
            elif line := self._line():
                self._narrator.say(line)

    def _line(self) -> str:
        with self._lock:
            if not self._title:
                return ""
            where = [
                f"{label}, step {done}" if total is None else f"{label}, step {done} of {total}"
                for label, (done, total) in self._loops.items()
            ]
            return f"{self._title}, {time.perf_counter() - self._began:.0f} s: {'; '.join(where) or 'at work'}"

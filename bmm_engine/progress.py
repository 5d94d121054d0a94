"""Progress bars on standard error: shown on a terminal, silent elsewhere, so that piped output stays clean.

Who wants to show it another way listens: then no bar is drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")
Report = Callable[[str], None]  # hears a line about what was done


class Listener(Protocol):
    """Hears how far each tracked loop is, by its label: at its begin, after every item, and when it is left."""

    def step(self, label: str, done: int, total: int | None) -> None: ...
    def end(self, label: str) -> None: ...


_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def listening() -> Listener | None:
    return _LISTENER.get()


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """All that is tracked in here is told to `listener`, in place of a bar."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def track(items: Iterable[T], label: str, *, total: int | None = None, show: bool | None = None) -> Iterator[T]:
    """Yield `items` under a progress bar. `show`: None shows it where standard error is a terminal; a listener hears in any case."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    listener = listening()
    if listener is not None:
        yield from _told(items, label, total, listener)
        return
    if show is False or (show is None and not sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, markup=False, emoji=False), transient=True) as bar:
        task = bar.add_task(label, total=total)
        for item in items:
            yield item
            bar.advance(task)


def _told(items: Iterable[T], label: str, total: int | None, listener: Listener) -> Iterator[T]:
    listener.step(label, 0, total)
    try:
        for done, item in enumerate(items, start=1):
            yield item
            listener.step(label, done, total)
    finally:
        listener.end(label)


@contextmanager
def quiet_transformers(reports: bool = True) -> Iterator[None]:
    """Keep transformers from drawing a bar for every checkpoint it reads or writes; with `reports` off, also from listing what a file lacks."""
    from transformers.utils import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not reports:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()

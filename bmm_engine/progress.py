"""Progress bars on standard error: shown on a terminal, silent elsewhere, so that piped output stays clean."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
Report = Callable[[str], None]  # hears a line about what was done


def track(items: Iterable[T], label: str, *, total: int | None = None, show: bool | None = None) -> Iterator[T]:
    """Yield `items` under a progress bar. `show`: None shows it where standard error is a terminal."""
    if show is False or (show is None and not sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if total is None and isinstance(items, Sized):
        total = len(items)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, markup=False, emoji=False), transient=True) as bar:
        task = bar.add_task(label, total=total)
        for item in items:
            yield item
            bar.advance(task)


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

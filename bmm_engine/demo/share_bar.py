"""A share as a bar and a number, in a table on any terminal or in none."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

WIDTH = 26
_NUMBER = 6
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class ShareBar:
    """`share` in percent behind a bar that is full at `full`. Where there is little room the bar is the first to yield."""

    share: float
    full: float = 1.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(0, min(WIDTH, options.max_width - _NUMBER))
        bar = self._blocks(width, options.ascii_only)
        yield Text(f"{bar:{width}}{100 * self.share:{_NUMBER}.1f}", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_NUMBER, min(WIDTH + _NUMBER, options.max_width))

    def _blocks(self, width: int, ascii_only: bool) -> str:
        eighths = round(8 * width * min(1.0, self.share / self.full))
        if ascii_only:
            return "#" * round(eighths / 8)
        return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()

"""The picture of a study of studies: test scores along an axis, mean and deviation over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm_engine.disk.files import write_whole
from bmm_engine.report.figures import Chart, Look, label, render, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def study_picture(rows: Sequence[Mapping[str, Any]], axis: str, path: Path) -> Path:
    """Write a PNG of `studies.summary` rows. Raises `ConfigError` without matplotlib."""
    lines = sorted({(row["anchor"], row["source"]) for row in rows})

    def draw(figure: Figure, look: Look) -> None:
        axes = figure.add_subplot()
        tidy(axes, look)
        for i, (anchor, source) in enumerate(lines):
            own = [row for row in rows if (row["anchor"], row["source"]) == (anchor, source)]
            x, y, deviation = ([row[key] for row in own] for key in ("x", "test", "test_std"))
            mean = [100 * v for v in y]
            axes.plot(x, mean, marker="o", markersize=4, color=look.colour(i), label=label(f"{anchor}, {source}", 40))
            low, high = ([m + sign * 100 * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=look.colour(i), alpha=0.15, linewidth=0)
            axes.axhline(100 * own[-1]["default_test"], color=look.colour(i), linestyle=":", linewidth=1)
        axes.set_xlabel(axis)
        axes.set_ylabel("test, % of the experts")
        axes.legend(fontsize="small", title="dotted: without a search", title_fontsize="small")

    chart = Chart("study", "Study", "", draw, 4.2)
    write_whole(path, render(chart, Look(dark=False, narrow=False), "png"))
    return path

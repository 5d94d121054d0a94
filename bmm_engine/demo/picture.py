"""The demo's picture: each method's mean accuracy as a bar, its worst task as a marker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm_engine.demo.results import Result
from bmm_engine.disk.files import write_whole
from bmm_engine.report.figures import Chart, Look, label, render, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def results_picture(rows: Sequence[Result], path: Path) -> Path:
    """Write a PNG of `rows`, the first (the experts) at the top. Raises `ConfigError` without matplotlib."""

    def draw(figure: Figure, look: Look) -> None:
        axes = figure.add_subplot()
        tidy(axes, look, grid="x")
        places = [-place for place in range(len(rows))]
        means = [100 * row.mean for row in rows]
        worst = [min(row.scores.items(), key=lambda item: item[1]) for row in rows]
        merges = range(2, len(rows))  # below what they are compared with
        colours = [look.colour(0) if i in merges else look.colour(6) for i in range(len(rows))]
        if merges:
            colours[-1] = look.colour(2)
        axes.barh(places, means, 0.68, color=colours, label="mean of the tasks")
        axes.scatter(
            [100 * score for _, score in worst], places, marker="D", s=34, color=look.colour(4),
            edgecolors=look.paper, linewidths=1.0, zorder=3, label="worst task",
        )  # fmt: skip
        axes.axvline(means[0], color=look.ink, linestyle=(0, (4, 3)), linewidth=1, zorder=2)
        beside: Any = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
        for place, mean, row in zip(places, means, rows, strict=True):
            axes.annotate(f"{mean:.1f}", (mean, place), (-6, 0), ha="right", color=look.paper, weight="bold", **beside)
            share = f"{100 * row.mean_normalised:.1f}"
            axes.annotate(share, (100, place), (62, 0), ha="right", color=look.ink, **beside)
        axes.annotate("% of experts", (100, 0.72), (62, 0), ha="right", color=look.muted, size="small", **beside)
        axes.set_yticks(places, [label(row.method, 24) for row in rows])
        axes.tick_params(axis="y", labelcolor=look.ink)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_ylim(places[-1] - 0.5, 0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("test accuracy, %")
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside upper left", ncols=2, fontsize="small")

    chart = Chart("results", "Results", "", draw, 1.1 + 0.42 * len(rows))
    write_whole(path, render(chart, Look(dark=False, narrow=False), "png"))
    return path

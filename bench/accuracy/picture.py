"""`python -m bench accuracy-picture`: accuracy by method on both suites, drawn from rows that `python -m bench accuracy` wrote.

A bar is the mean over seeds of `normalised`, its diamond the worst task of any seed. A method is taken from the file of several seeds, or, where that
lacks it, from the file of one seed; such a bar is marked.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.accuracy import results
from bench.accuracy.command import SUITES
from bench.accuracy.results import Result

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"

OURS = {
    "bmm merge": ("sequential, weighted outputs", "average"),
    "BMM, plain": ("hybrid, weighted outputs", "average"),
    "BMM, data-free": ("data-free", "average"),
}
RULES = {
    "TSV-M": ("anchor", "tsv_m"),
    "Iso-C": ("anchor", "iso_c"),
    "RegMean++": ("anchor", "regmean_plusplus"),
    "RegMean": ("anchor", "regmean"),
    "TIES": ("anchor", "ties"),
    "average": ("anchor", "average"),
}
BEST = "best other rule, scaled"  # of all rules, each also at its best validated scale
_SCALED = ("anchor", "anchor, scale searched")

_STRONG, _OURS, _BEST, _RULE, _INK = "#1f5a96", "#6f9fcb", "#8f8f89", "#c9c8c2", "#333333"
_GAP = 0.4  # between ours and the other rules
_VALUES = 103  # where the numbers stand: right of the experts' line

_DIAMOND: dict[str, Any] = {
    "marker": "D",
    "color": "white",
    "markeredgecolor": _INK,
    "markersize": 5,
    "linestyle": "none",
}


@dataclass(frozen=True)
class Bar:
    """In percent of what the experts score."""

    suite: str
    label: str
    mean: float
    worst: float
    seeds: int
    note: str = ""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench accuracy-picture", description=__doc__)
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE.png")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="where SUITE.json and SUITE-seed0.json are"
    )
    options = parser.parse_args(arguments)
    found = read(options.results)
    for bar in found:
        note = f" ({bar.note})" if bar.note else ""
        print(f"{bar.suite} {bar.label}: {bar.mean:.1f} / {bar.worst:.1f}, seeds: {bar.seeds}{note}")
    save(found, options.plot)
    return 0


def read(folder: Path) -> list[Bar]:
    """The bars of both suites. Raises `KeyError` for a method that neither file of a suite has."""
    return [
        bar
        for suite in SUITES
        for bar in bars(suite, results.read(folder / f"{suite}.json"), results.read(folder / f"{suite}-seed0.json"))
    ]


def bars(suite: str, seeds: Sequence[Result], one_seed: Sequence[Result]) -> list[Bar]:
    """From the top: ours, the best other rule, the other rules by their mean."""
    single = results.by_row(one_seed)
    rows = {**single, **results.by_row(seeds)}  # where both have a row, that of several seeds
    ours = [_bar(suite, label, rows[key]) for label, key in OURS.items()]
    rules = [_bar(suite, label, rows[key]) for label, key in RULES.items()]
    (_, rule), best = max(
        ((key, own) for key, own in single.items() if key[0] in _SCALED),
        key=lambda item: statistics.mean(r.normalised for r in item[1]),
    )
    return [*ours, _bar(suite, BEST, best, _named(rule, best[0].chosen)), *sorted(rules, key=lambda bar: -bar.mean)]


def _named(rule: str, chosen: Mapping[str, Any] | None) -> str:
    scale = (chosen or {}).get("scale", 1.0)
    return rule if scale == 1 else f"{rule}, scale {scale:g}"


def _bar(suite: str, label: str, own: Sequence[Result], note: str = "") -> Bar:
    mean = 100 * statistics.mean(r.normalised for r in own)
    return Bar(suite, label, mean, 100 * min(r.worst for r in own), len(own), note)


def figure(found: Sequence[Bar]) -> Any:
    """One panel for each suite, methods in the order of the first."""
    from matplotlib.figure import Figure

    suites = list(dict.fromkeys(bar.suite for bar in found))
    labels = [bar.label for bar in found if bar.suite == suites[0]]
    heights = {label: y + (0 if label in OURS else _GAP) for y, label in enumerate(labels)}
    drawn = Figure(figsize=(9, 1.1 + 0.32 * len(labels)), layout="constrained", facecolor="white")
    panels = drawn.subplots(1, len(suites), sharey=True, squeeze=False)[0]
    for axes, suite in zip(panels, suites, strict=True):
        for bar in (bar for bar in found if bar.suite == suite):
            _draw(axes, heights[bar.label], bar)
        axes.set_title(suite, fontsize=11, fontweight="bold", color=_INK, loc="left")
        axes.axvline(100, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 116)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("% of what the experts score", fontsize=9, color=_INK)
        axes.tick_params(axis="x", labelsize=8, colors=_INK)
        axes.tick_params(axis="y", length=0, colors=_INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(list(heights.values()), labels, fontsize=10)
    panels[0].get_yticklabels()[0].set_fontweight("bold")
    panels[0].set_ylim(max(heights.values()) + 0.6, -0.6)
    (worst,) = panels[0].plot([], [], **_DIAMOND)
    explained = ["worst task of any seed        * one seed, the others three"]
    drawn.legend([worst], explained, loc="outside lower center", frameon=False, fontsize=8.5, labelcolor=_INK)
    return drawn


def _draw(axes: Any, y: float, bar: Bar) -> None:
    ours = list(OURS)
    colour = _STRONG if bar.label == ours[0] else _OURS if bar.label in ours else _BEST if bar.label == BEST else _RULE
    axes.barh(y, bar.mean, height=0.74, color=colour)
    axes.plot([bar.worst], [y], **_DIAMOND)
    value = f"{bar.mean:.1f}" + ("" if bar.seeds > 1 else "*")
    weight = "bold" if bar.label == ours[0] else "normal"
    axes.text(_VALUES, y, value, va="center", fontsize=9, color=_INK, fontweight=weight)
    if bar.note:
        axes.text(2, y, bar.note, va="center", fontsize=8.5, color="white")


def save(found: Sequence[Bar], path: Path) -> None:
    """The picture in few colours, with its numbers in the file's description."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    drawn, description = io.BytesIO(), PngInfo()
    figure(found).savefig(drawn, format="png", dpi=140)
    description.add_text("Description", json.dumps([asdict(bar) for bar in found]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(64).save(path, format="PNG", optimize=True, pnginfo=description)

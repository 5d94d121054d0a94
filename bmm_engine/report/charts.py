"""The pictures of a report, each from a study's contents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bmm_engine.models.roles import ROLES
from bmm_engine.report.contents import Contents
from bmm_engine.report.drift import drift_chart
from bmm_engine.report.figures import Chart, Look, label, tidy
from bmm_engine.report.names import ROLE_NAMES
from bmm_engine.searching.schema import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 12


def charts(contents: Contents) -> list[Chart]:
    """Those that there is something to show in."""
    found = []
    if contents.finished:
        found += [_best_so_far(contents), _tasks(contents)]
        if (both := _on_both(contents)) and len(both) > 1:
            found.append(_validation_test(both))
        found.append(_ridge(contents))
    if contents.inputs:
        found.append(drift_chart(contents.tasks, contents.inputs))
    if contents.alignment:
        found.append(_alignment(contents))
    return found


def _best_so_far(contents: Contents) -> Chart:
    anchors = list(contents.record["anchors"])
    told = contents.told

    floor = _floor(contents)

    def draw(figure: Figure, look: Look) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        tidy(axes, look)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

        def scatter(own: Sequence[Trial], name: str | None, **style: Any) -> None:
            """What lies below the picture is a triangle at its foot."""
            for low in (False, True):
                part = [t for t in own if (_percent(t) < floor) == low]
                if part:
                    marker: dict[str, Any] = {"marker": "v"} if low else {}
                    axes.scatter(
                        [t.number for t in part], [max(_percent(t), floor) for t in part], label=name, **style, **marker
                    )
                    name = None

        for i, anchor in enumerate(anchors):
            own = [t for t in told if t.state == "finished" and t.parameters["anchor"] == anchor]
            name = label(anchor, 24) if len(anchors) > 1 else "trial"
            scatter(own, name, s=22, color=look.colour(i), alpha=0.85, linewidths=0, zorder=3)
        pruned = [t for t in told if t.state == "pruned"]
        scatter(pruned, "given up", s=20, facecolors="none", edgecolors=look.muted, zorder=2)
        failed = [t.number for t in told if t.state == "failed"]
        if failed:
            axes.scatter(failed, [floor] * len(failed), marker="x", s=24, color=look.colour(1), label="failed")
        finished = sorted(contents.finished, key=lambda t: t.number)
        top = np.maximum(np.maximum.accumulate([_percent(t) for t in finished]), floor)
        axes.step(
            [t.number for t in finished],
            top,
            where="post",
            color=look.ink,
            linewidth=1.6,
            label="best so far",
            zorder=4,
        )
        for name, style in (("anchor", ":"), ("default", "--")):
            trial = contents.first(name)
            if trial is not None:
                axes.axhline(_percent(trial), color=look.muted, linestyle=style, linewidth=1.1, label=name, zorder=1)
        axes.set_xlabel("trial")
        axes.set_ylabel("% of the experts")
        figure.legend(loc="outside upper right", fontsize="small", ncols=2 if look.narrow else 5)

    best = contents.best
    alt = f"Objective of {len(told)} trials and the best so far, which ends at {100 * (best.value if best and best.value else 0):.1f} %."
    return Chart("best_so_far", "Best so far", alt, draw, 3.8, 3.3)


def _floor(contents: Contents) -> float:
    """The lowest value shown: a few very bad trials must not flatten the rest."""
    values = [_percent(t) for t in contents.finished]
    marked = [_percent(t) for t in (contents.first("anchor"), contents.first("default")) if t is not None]
    low = min([float(np.quantile(values, 0.1)), *marked])
    return low - 0.05 * (max(values) - low)


def _percent(trial: Trial) -> float:
    return 100 * (trial.value or 0.0)


def _tasks(contents: Contents) -> Chart:
    splits = [s for s in ("validation", "test") if contents.best and contents.scores(contents.best, s)]
    tasks = contents.tasks[:MOST_BARS]

    def draw(figure: Figure, look: Look) -> None:
        grid = figure.subplots(len(splits), 1, squeeze=False)[:, 0]
        for axes, split in zip(grid, splits, strict=True):
            _bars(axes, look, contents, split, tasks)
            axes.set_title(split, loc="left", fontsize="medium", color=look.muted)
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2 if look.narrow else 4, fontsize="small")

    names = ", ".join(name for name, _ in contents.rows())
    alt = f"Scores in percent by task, with 95 % intervals, of {names}; on {' and '.join(splits)}."
    return Chart(
        "tasks",
        "Scores by task",
        alt,
        draw,
        0.6 + 2.7 * len(splits),
        0.6 + 0.36 * len(tasks) * len(splits) + 1.2 * len(splits),
    )


def _bars(axes: Axes, look: Look, contents: Contents, split: str, tasks: Sequence[str]) -> None:
    rows = [(name, contents.scores(trial, split)) for name, trial in contents.rows()]
    rows = [(name, own) for name, own in rows if own]
    width = 0.8 / len(rows)
    place = np.arange(len(tasks))
    colours = {
        "experts": "#c3cad2" if not look.dark else "#57606a",
        "anchor": look.colour(5),
        "default": look.colour(0),
        "best": look.colour(1),
    }
    for i, (name, own) in enumerate(rows):
        values = [100 * own[t].value for t in tasks]
        errors = np.array(
            [
                [max(0.0, v - 100 * own[t].low), max(0.0, 100 * own[t].high - v)]
                for v, t in zip(values, tasks, strict=True)
            ]
        ).T
        errors = np.nan_to_num(errors)
        at = place + (i - (len(rows) - 1) / 2) * width
        style: dict[str, Any] = {
            "color": colours[name],
            "label": name,
            "error_kw": {"ecolor": look.muted, "elinewidth": 0.9},
        }
        if look.narrow:
            axes.barh(-at, values, width * 0.92, xerr=errors, **style)
        else:
            axes.bar(at, values, width * 0.92, yerr=errors, **style)
    short = [label(t) for t in tasks]
    if look.narrow:
        axes.set_yticks(-place, short)
        axes.set_xlim(0, 100)
        tidy(axes, look, grid="x")
    else:
        axes.set_xticks(place, short, rotation=20 if len(tasks) > 7 else 0, ha="right" if len(tasks) > 7 else "center")
        lowest = min(100 * own[t].value for _, own in rows for t in tasks)
        axes.set_ylim(max(0, 10 * math.floor(lowest / 10 - 1)), 100)
        axes.set_ylabel("%")
        tidy(axes, look)


def _on_both(contents: Contents) -> list[tuple[int, str, float, float]]:
    """(trial, kind, validation, test) of the trials judged on both."""
    found = []
    for trial in contents.finished:
        test = contents.value(trial, "test") if trial.number in contents.test else None
        if test is not None and trial.value is not None:
            best = contents.best
            kind = "best" if best and trial.number == best.number else trial.kind
            found.append((trial.number, kind, 100 * trial.value, 100 * test))
    return found


def _validation_test(points: Sequence[tuple[int, str, float, float]]) -> Chart:
    def draw(figure: Figure, look: Look) -> None:
        axes = figure.add_subplot()
        tidy(axes, look, grid="both")
        colours = {"anchor": look.colour(5), "default": look.colour(0), "proposed": look.muted, "best": look.colour(1)}
        labels = {"proposed": "once the best"}
        for kind, colour in colours.items():
            own = [p for p in points if p[1] == kind]
            if own:
                axes.scatter([p[2] for p in own], [p[3] for p in own], s=46 if kind == "best" else 30, color=colour,
                             label=labels.get(kind, kind), zorder=3)  # fmt: skip
        low, high = min(min(p[2:]) for p in points), max(max(p[2:]) for p in points)
        axes.plot([low, high], [low, high], color=look.grid, linewidth=1.2, zorder=1)
        axes.set_xlabel("validation, % of the experts")
        axes.set_ylabel("test, % of the experts")
        axes.legend(loc="lower right", fontsize="small")

    alt = f"Test against validation objective of {len(points)} trials: " + "; ".join(
        f"{kind} {v:.1f} and {t:.1f} %" for _, kind, v, t in points if kind != "proposed"
    )
    return Chart("validation_test", "Validation against test", alt, draw, 3.8, 3.6)


def _ridge(contents: Contents) -> Chart:
    best = contents.best
    assert best is not None
    alpha = {group: float(value) for group, value in best.parameters["alpha"].items()}
    values = {module: alpha[own["group"]] for module, own in contents.record["modules"].items()}
    cells, rows = _map(
        contents, {m: math.log10(v) if math.isfinite(v) and v > 0 else math.nan for m, v in values.items()}
    )
    anchored, _ = _map(contents, {m: 1.0 if v == math.inf else 0.0 for m, v in values.items()})

    def draw(figure: Figure, look: Look) -> None:
        _heat(figure, look, cells, rows, "log10 of alpha", "viridis", marks=np.nan_to_num(anchored) >= 0.5)

    finite = [v for v in alpha.values() if math.isfinite(v)]
    span = f"from {min(finite):.2g} to {max(finite):.2g}" if finite else "infinite everywhere"
    return Chart(
        "ridge", "Ridge of the best trial", f"Relative ridge by role and layer, {span}; A marks the anchor itself.", draw,
        1.1 + 0.42 * len(rows), 1.2 + 0.36 * len(rows),
    )  # fmt: skip


def _alignment(contents: Contents) -> Chart:
    means = {module: sum(own.values()) / len(own) for module, own in contents.alignment.items() if own}
    cells, rows = _map(contents, means)

    def draw(figure: Figure, look: Look) -> None:
        _heat(figure, look, cells, rows, "cosine, mean over tasks", "cividis", limits=(0.0, 1.0))

    low = min(means.values(), default=math.nan)
    return Chart(
        "alignment", "Do task vectors tell the Gram?", f"cos(G, U^T U) by role and layer, from {low:.2f}.", draw,
        1.1 + 0.42 * len(rows), 1.2 + 0.36 * len(rows),
    )  # fmt: skip


def _map(contents: Contents, values: Mapping[str, float]) -> tuple[np.ndarray, list[str]]:
    """Means over the modules of each (role, layer); the last column holds what is outside the layers, where there is such."""
    modules = contents.record["modules"]
    layers = 1 + max((own["layer"] for own in modules.values() if own["layer"] is not None), default=-1)
    outside = any(own["layer"] is None for m, own in modules.items() if m in values)
    roles = [role for role in ROLES if any(modules[m]["role"] == role for m in values if m in modules)]
    sums = np.zeros((len(roles), layers + outside))
    counts = np.zeros_like(sums)
    for module, value in values.items():
        own = modules.get(module)
        if own is None:
            continue
        column = layers if own["layer"] is None else own["layer"]
        sums[roles.index(own["role"]), column] += value
        counts[roles.index(own["role"]), column] += 1
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), [ROLE_NAMES[r] for r in roles]


def _heat(
    figure: Figure, look: Look, cells: np.ndarray, rows: Sequence[str], label: str, colours: str,
    limits: tuple[float, float] | None = None, marks: np.ndarray | None = None,
) -> None:  # fmt: skip
    axes = figure.add_subplot()
    known = cells[np.isfinite(cells)]
    low, high = limits or ((known.min(), known.max()) if known.size else (0.0, 1.0))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    shown = np.ma.masked_invalid(cells)
    image = axes.imshow(shown, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    axes.set_yticks(range(len(rows)), rows)
    step = max(1, math.ceil(cells.shape[1] / (8 if look.narrow else 24)))
    axes.set_xticks(range(0, cells.shape[1], step))
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks(np.arange(0.5, cells.shape[1] - 0.5), minor=True)
    axes.set_yticks(np.arange(0.5, cells.shape[0] - 0.5), minor=True)
    axes.grid(which="minor", color=look.paper, linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    small = cells.shape[1] <= (8 if look.narrow else 16)
    for (i, j), value in np.ndenumerate(cells):
        if marks is not None and marks[i, j]:
            axes.text(j, i, "A", ha="center", va="center", fontsize="small", color=look.ink)
        elif small and math.isfinite(value):
            light = (value - low) / (high - low) > 0.6
            axes.text(j, i, f"{value:.1f}" if limits is None else f"{value:.2f}", ha="center", va="center", fontsize="x-small",
                      color="#10151a" if light else "#ffffff")  # fmt: skip
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05, location="bottom" if look.narrow else "right")
    bar.set_label(label, fontsize="small")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize="small")

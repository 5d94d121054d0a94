"""What a sequential merge found at each input of the network, as a picture and as a page of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm_engine.checkpoint import RECORD_FILENAME
from bmm_engine.checkpoint.provenance import read_merge_record
from bmm_engine.errors import ConfigError
from bmm_engine.models.roles import ROLES, Layers, module_role
from bmm_engine.report.document import document, save, table
from bmm_engine.report.figures import Chart, Look, label, picture, tidy
from bmm_engine.report.names import ROLE_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTE = (
    "How far what the merged network's modules give is from what the expert's give, relative to what fine-tuning changed in these modules: 0 is the"
    " expert. Of modules that write to the residual stream it is what that holds after them, drift from before included. Deeper in the network it"
    " adds up, and is often above 1. Dotted with the anchor's weights, solid as solved."
)
MOST_LINES = 7  # colours


def write_merge_report(folder: Path, output: Path | None = None) -> Path:
    """Write `report.html` about the sequential merge in `folder`, and its picture as a PNG, into `output` (default: NAME.report beside it).

    Raises `ConfigError` for what is no sequential merge, `OutputWriteError`, and `ConfigError` without matplotlib.
    """
    path = folder / RECORD_FILENAME
    if not path.is_file():
        raise ConfigError(f"{folder}: holds neither a study nor a merge by this engine ({RECORD_FILENAME}).")
    record = read_merge_record(path)
    inputs = (record.get("modules") or {}).get("inputs") or []
    if not inputs:
        raise ConfigError(
            f"{folder}: there is nothing to report of a merge in the mode plain. Merge with mode: sequential, or report a search."
        )
    tasks = tasks_of(record["recipe"])
    chart = drift_chart(tasks, inputs)
    parts = [
        f"<header><h1>{escape(folder.name)}</h1><p class='lead'>{escape(_lead(record, tasks))}</p></header>",
        f"<section class='card'><h2>{escape(chart.title)}</h2>{picture(chart)}<p class='fine'>{escape(NOTE)}</p></section>",
        f"<section class='card'><h2>Where the merge loses most</h2>{_worst(tasks, inputs)}</section>",
        f"<section class='card'><details><summary>All {len(inputs)} inputs</summary>{_all(tasks, inputs)}</details></section>",
        f"<section class='card'><details><summary>Recipe</summary><pre>{escape(json.dumps(record['recipe'], indent=1))}</pre></details></section>",
    ]
    return save(
        output or folder.with_name(f"{folder.name}.report"),
        document(f"{folder.name}: sequential merge", parts),
        [chart],
    )


def tasks_of(recipe: Mapping[str, Any]) -> list[str]:
    """What the experts of a recorded recipe are called."""
    names = []
    for expert in recipe["experts"]:
        model = expert["model"] if isinstance(expert["model"], str) else expert["model"].get("model", "expert")
        names.append(expert.get("name") or Path(model).name)
    return names


def drift_chart(tasks: Sequence[str], inputs: Sequence[Mapping[str, Any]]) -> Chart:
    """Relative residuals by layer, a panel for each role."""
    layers = Layers([module for own in inputs for module in own["modules"]])
    panels: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for own in inputs:
        layer = layers(own["modules"][0])
        if layer is not None:
            panels.setdefault(module_role(own["modules"][0]), []).append((layer, own))
    roles = [role for role in ROLES if role in panels]

    def draw(figure: Figure, look: Look) -> None:
        from matplotlib.ticker import MaxNLocator

        rows, columns = (len(roles), 1) if look.narrow else ((len(roles) + 1) // 2, min(2, len(roles)))
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for axes in grid.flat[len(roles) :]:
            axes.set_visible(False)
        for axes, role in zip(grid.flat, roles, strict=False):
            tidy(axes, look)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(ROLE_NAMES[role], loc="left", fontsize="medium", color=look.muted)
            for t, task in enumerate(tasks[:MOST_LINES]):
                for key, style in (("before", ":"), ("after", "-")):
                    points = [(layer, own[key][t]) for layer, own in panels[role] if own[key][t] is not None]
                    if points:
                        name = label(task, 24) if key == "after" else None
                        axes.plot(*zip(*points, strict=True), style, color=look.colour(t), linewidth=1.4, label=name)
            axes.set_ylim(bottom=0)
        for axes in grid[-1]:
            axes.set_xlabel("layer")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2 if look.narrow else 4, fontsize="small")

    first, last = (_mean([own[key][t] for own in inputs for t in range(len(tasks))]) for key in ("before", "after"))
    alt = f"Relative residuals by role, layer and task: {first} on average with the anchor's weights, {last} as solved."
    height = 1.0 + 2.1 * ((len(roles) + 1) // 2)
    return Chart("drift", "What each input leaves of the experts", alt, draw, height, 1.2 + 1.9 * len(roles))


def _lead(record: Mapping[str, Any], tasks: Sequence[str]) -> str:
    anchor = record["recipe"].get("anchor") or {}
    return (
        f"{len(tasks)} experts merged block by block on the anchor {anchor.get('name', 'average')}: {', '.join(tasks)}."
    )


def _worst(tasks: Sequence[str], inputs: Sequence[Mapping[str, Any]]) -> str:
    found = [
        (value, task, own)
        for own in inputs
        for task, value in zip(tasks, own["after"], strict=True)
        if value is not None
    ]
    found.sort(key=lambda item: -item[0])
    rows = [(own["modules"][0], task, _text(own["before"][tasks.index(task)]), _text(v)) for v, task, own in found[:8]]
    return table(("input of", "task", "with the anchor", "solved"), rows)


def _all(tasks: Sequence[str], inputs: Sequence[Mapping[str, Any]]) -> str:
    head = ("input of", "alpha", *(f"{task}: anchor, solved" for task in tasks))
    rows = [
        (
            ", ".join(own["modules"]),
            f"{float(own['alpha']):.3g}",
            *(f"{_text(a)} → {_text(b)}" for a, b in zip(own["before"], own["after"], strict=True)),
        )
        for own in inputs
    ]
    return table(head, rows)


def _text(value: float | None) -> str:
    return "unchanged" if value is None else f"{value:.2f}"


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{sum(known) / len(known):.2f}" if known else "nothing"

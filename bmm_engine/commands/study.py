"""`bmm study`: how much validation data, and how many trials, a search needs."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bmm_engine.commands.common import AllowCode, Json, Offline, WriteTo, about, make_console, print_json, reporter_of
from bmm_engine.errors import ConfigError, shown

app = typer.Typer(
    name="study", help="How much validation data, and how many trials, a search needs.", no_args_is_help=True
)

RecipePath = Annotated[Path, typer.Argument(help="The YAML recipe, with validation and test data.", show_default=False)]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="The folder for results and all studies.", show_default=False)
]
Anchors = Annotated[str, typer.Option(help="Names, separated by commas.")]
Sources = Annotated[str, typer.Option(help="data, task_vectors (data-free), hybrid; separated by commas.")]
Seeds = Annotated[int, typer.Option(min=1, help="Seeds of the optimiser, and of what part of the data is drawn.")]
Workers = Annotated[int, typer.Option(min=1, help="Local processes, one model each.")]


@app.command("validation-fraction")
def validation_fraction(
    recipe: RecipePath,
    output: Output,
    shares: Annotated[
        str, typer.Option(help="Shares of the validation data, separated by commas.")
    ] = "0.05,0.1,0.25,0.5,1",
    anchors: Anchors = "tsv_m,iso_cts",
    sources: Sources = "data,task_vectors",
    seeds: Seeds = 5,
    trials: Annotated[int, typer.Option(min=1, help="Trials of each search.")] = 60,
    workers: Workers = 1,
    allow_code: AllowCode = False,
    write_to: WriteTo = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Test scores against the share of the validation data that a search sees; mean and deviation over seeds."""
    from bmm_engine.searching import studies

    loaded, axes = _load(recipe, anchors, sources, seeds, offline, allow_code, write_to, trials)
    parts = _numbers(shares, "--shares")
    with about(recipe):
        points = studies.validation_fraction(
            loaded, output, axes, parts, workers=workers, local_files_only=offline, report=reporter_of(as_json)
        )
    _show(points, output, "share of the validation data", as_json)


@app.command("trials")
def number_of_trials(
    recipe: RecipePath,
    output: Output,
    counts: Annotated[str, typer.Option(help="Numbers of trials, separated by commas.")] = "2,5,10,20,40,60",
    anchors: Anchors = "tsv_m,iso_cts",
    sources: Sources = "data,task_vectors",
    seeds: Seeds = 5,
    workers: Workers = 1,
    allow_code: AllowCode = False,
    write_to: WriteTo = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Test scores against the number of trials; mean and deviation over seeds."""
    from bmm_engine.searching import studies

    loaded, axes = _load(recipe, anchors, sources, seeds, offline, allow_code, write_to, None)
    numbers = [int(n) for n in _numbers(counts, "--counts")]
    with about(recipe):
        points = studies.number_of_trials(
            loaded, output, axes, numbers, workers=workers, local_files_only=offline, report=reporter_of(as_json)
        )
    _show(points, output, "trials", as_json)


def _load(
    path: Path,
    anchors: str,
    sources: str,
    seeds: int,
    offline: bool,
    allow_code: bool,
    write_to: Any,
    trials: int | None,
) -> tuple[Any, Any]:
    from bmm_engine.recipe.code import check_code
    from bmm_engine.recipe.recipe import Recipe
    from bmm_engine.searching.studies import Axes

    loaded = Recipe.load(path.resolve(), local_files_only=offline, defaults={"mode": "plain"}, write_to=write_to or ())
    with about(path):
        check_code(loaded, allow_code)
    if trials is not None:
        loaded = loaded.with_search(trials=trials)
    return loaded, Axes(tuple(_names(anchors)), tuple(_names(sources)), seeds)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, option: str) -> list[float]:
    try:
        found = sorted(float(part) for part in _names(text))
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise ConfigError(f"{option}: {shown(text)} is no list of numbers; separate them by commas.")
    return found


def _show(points: list[Any], output: Path, axis: str, as_json: bool) -> None:
    from bmm_engine.report.curves import study_picture
    from bmm_engine.searching.studies import PICTURE, RESULTS, summary

    rows = summary(points)
    picture = study_picture(rows, axis, output / PICTURE)
    if as_json:
        return print_json({"rows": rows, "points": [asdict(p) for p in points], "picture": str(picture)})
    from rich.table import Table

    table = Table("anchor", "Grams", axis, "validation", "test", "default", "anchor alone", title="% of the experts")
    for row in rows:
        cells = [
            f"{100 * row[k]:.2f} ± {100 * row[f'{k}_std']:.2f}"
            for k in ("validation", "test", "default_test", "anchor_test")
        ]
        table.add_row(row["anchor"], row["source"], f"{row['x']:g}", *cells)
    console = make_console(min_width=120)
    console.print(table)
    console.print(f"All points: {output / RESULTS}; picture: {picture}", highlight=False)

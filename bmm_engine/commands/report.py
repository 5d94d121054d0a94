"""`bmm report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bmm_engine.commands.common import Json, make_console, print_json


def report(
    study: Annotated[
        Path, typer.Argument(help="A study (NAME.study), or the merge beside it (NAME).", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to write into (default: the study's).", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a study as one HTML page, report.html, and its pictures as PNG. The search may still be running."""
    from bmm_engine.report import write_report

    beside = study.with_name(f"{study.name}.study")
    path = write_report(beside if not (study / "trials.sqlite").exists() and beside.is_dir() else study, output)
    if as_json:
        return print_json({"report": str(path), "pictures": sorted(str(p) for p in path.parent.glob("*.png"))})
    make_console().print(f"[bold]{path}[/bold]: open it in a browser.", highlight=False)

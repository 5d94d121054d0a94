"""`bmm report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bmm_engine.commands.common import Json, headline, make_console, print_json


def report(
    study: Annotated[
        Path,
        typer.Argument(
            help="A study (NAME.study), the merge beside it (NAME), or a sequential merge of its own.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The folder to write into (default: the study's; of a merge, NAME.report).",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a study, or what a sequential merge found at each input, as one HTML page, report.html, and its pictures as PNG.

    The search may still be running.
    """
    from bmm_engine.report import write_merge_report, write_report

    beside = study.with_name(f"{study.name}.study")
    if (study / "trials.sqlite").exists():
        path = write_report(study, output)
    elif beside.is_dir():
        path = write_report(beside, output)
    elif (study / "bmm_merge.json").exists():
        path = write_merge_report(study, output)
    else:
        path = write_report(study, output)  # says that there is none
    if as_json:
        return print_json({"report": str(path), "pictures": sorted(str(p) for p in path.parent.glob("*.png"))})
    make_console().print(headline(path, ": open it in a browser."), highlight=False)

"""`bmm demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bmm_engine.commands.common import Json, make_console, print_json


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where experts, tables and the merged model go.")
    ] = Path("demo_output"),
    as_json: Json = False,
) -> None:
    """Fine-tune experts on real tasks, merge them in several ways, and show what each merge is worth."""
    from bmm_engine.demo.narrator import Narrator

    with Narrator(make_console(stderr=as_json, min_width=100)) as narrator:
        with narrator.stage("loading PyTorch and transformers"):
            from bmm_engine.demo.runner import run
        rows = run(output, narrator)
    if as_json:
        print_json(rows)

"""`bmm anchors`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from bmm_engine.commands.common import Json, headline, make_console, print_json


def anchors(
    name: Annotated[str | None, typer.Argument(help="One rule, in full.", show_default=False)] = None,
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown", help="Print the table in markdown, under the text that bmm_engine/anchors/README.md has."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the merging rules with their parameters and papers, or explain one."""
    from bmm_engine.anchors import get_anchor, table

    if markdown:
        sys.stdout.write(table.document())
        return
    rows = [row for row in table.rows() if name is None or row["name"] == get_anchor(name).name]
    if as_json:
        return print_json(rows)
    console = make_console(min_width=150)
    if name is not None:
        return _explain_anchor(console, get_anchor(name))
    from rich.table import Table

    shown = Table(
        "name", "scope", "parameters", "paper", caption="* may differ between experts; `bmm anchors NAME` explains one"
    )
    for row in rows:
        parameters = ", ".join(table.parameter_text(p) for p in row["parameters"])
        shown.add_row(
            row["name"], row["scope"] + (f", needs {row['needs']}" if row["needs"] else ""), parameters, row["paper"]
        )
    console.print(shown)


def _explain_anchor(console: Any, rule: Any) -> None:
    import inspect

    from rich.table import Table

    from bmm_engine.anchors.table import plain

    text = inspect.getdoc(rule.rule) or ""
    console.print(headline(rule.name, f", {rule.scope} scope: {rule.paper}\n\n{text}\n"), highlight=False)
    parameters = Table("parameter", "type", "default", "for each expert")
    for p in rule.schema:
        parameters.add_row(p["name"], p["type"], plain(p["default"]), "yes" if p["per_expert"] else "no")
    console.print(parameters)

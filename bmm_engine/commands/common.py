"""What the commands share: options, the console, JSON on standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the hub; use local files and the hub's cache.")]

WriteTo = Annotated[
    list[Path] | None,
    typer.Option(
        "--write-to",
        help="A folder, beside the recipe's and the working one, that the recipe's measured files may be written into; repeatable.",
        show_default=False,
    ),
]


def make_console(stderr: bool = False, min_width: int = 0) -> Any:
    from rich.console import Console

    console = Console(stderr=stderr, soft_wrap=not sys.stdout.isatty())
    if not console.is_terminal:
        console.width = max(console.width, min_width)  # a file or pipe has no width that a table should bow to
    return console


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def progress_of(as_json: bool) -> bool | None:
    return False if as_json else None


def reporter_of(as_json: bool) -> Any:
    console = make_console(stderr=True)
    return (lambda line: None) if as_json else (lambda line: console.print(line, highlight=False))

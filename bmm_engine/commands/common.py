"""What the commands share: options, the console, JSON on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bmm_engine.errors import BmmError, OutputExistsError, OutputWriteError, StudyError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the hub; use local files and the hub's cache.")]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code", help="Import and run functions that the recipe names (modules in BMM_ALLOW_CODE need no flag)."
    ),
]


def make_console(stderr: bool = False, min_width: int = 0) -> Any:
    """Prints text as it is: no markup, since names and paths may hold brackets. What is to be bold is a `Text` (see `headline`)."""
    from rich.console import Console

    console = Console(stderr=stderr, soft_wrap=not sys.stdout.isatty(), markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, min_width)  # a file or pipe has no width that a table should bow to
    return console


def headline(subject: Any, rest: str) -> Any:
    """A line that begins with what it is about, in bold."""
    from rich.text import Text

    return Text.assemble((str(subject), "bold"), rest)


@contextmanager
def about(source: Path | str) -> Iterator[None]:
    """What is wrong with a recipe, or with its models and data, is said with the recipe's name before it, unless it is said already."""
    try:
        yield
    except (OutputExistsError, OutputWriteError, StudyError):
        raise
    except BmmError as error:
        if Path(source).name not in str(error):
            error.args = (f"{source}: {error}", *error.args[1:])
        raise


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def progress_of(as_json: bool) -> bool | None:
    return False if as_json else None


def reporter_of(as_json: bool) -> Any:
    console = make_console(stderr=True)
    return (lambda line: None) if as_json else (lambda line: console.print(line, highlight=False))

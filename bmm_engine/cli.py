"""`bmm`: the commands of `commands/`, and how they end. Errors are one paragraph and exit code 2; `--json` prints plain values on standard output."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer

from bmm_engine.commands import anchors, collect, demo, inspect, merge, report, sample, search, study
from bmm_engine.commands.common import make_console
from bmm_engine.errors import BmmError

app = typer.Typer(
    name="bmm",
    help="Merge fine-tuned models of one base in closed form (Bayesian Model Merging).",
    epilog="Start with `bmm demo`. Errors show their traceback with `bmm --debug COMMAND ...`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads (default: torch's choice).")
    ] = None,
) -> None:
    if debug:
        os.environ["BMM_DEBUG"] = "1"
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


_COMMANDS = (
    merge.merge,
    collect.collect,
    inspect.inspect,
    anchors.anchors,
    search.search,
    report.report,
    sample.sample,
    demo.demo,
)
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(study.app)


def main() -> None:
    """Entry point of the command `bmm`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # names that the terminal's encoding lacks are no reason to fail
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app()
    except BmmError as error:
        if os.environ.get("BMM_DEBUG"):
            raise
        _say("error: ", "bold red", str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _say("interrupted", "bold red", "; nothing half-written was left behind.")
        raise SystemExit(130) from None


def _show_warning(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
    _say("warning: ", "bold yellow", str(message))


def _say(label: str, style: str, text: str) -> None:
    from rich.text import Text

    make_console(stderr=True).print(Text.assemble((label, style), text))

"""What the demo says last: where its files are, and how to go on."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def closing(output: Path, merged: Path, recipe: Path, picture: Path | None) -> str:
    files = {
        merged: f'the merged model: AutoModel.from_pretrained("{merged}", add_pooling_layer=False)',
        recipe: "what `bmm merge` made it from: base, experts, heads, sentences",
        output / "results.json": "every row of the table",
        **({} if picture is None else {picture: "the same as a picture"}),
    }
    bmm = _bmm()
    commands = {
        f"{bmm} inspect {recipe}": "what is solved, and what comes from the anchor",
        f"{bmm} report {merged}": "a page on how far each layer's inputs drifted",
    }
    return "\n".join(["", *_aligned(files), "", "Go on with", *_aligned(commands), ""])


def _aligned(rows: dict[Path, str] | dict[str, str]) -> list[str]:
    width = max(len(str(name)) for name in rows)
    return [f"  {name!s:{width}}  {what}" for name, what in rows.items()]


def _bmm() -> str:
    """The command as this shell finds it: in an environment that is not activated, by its path."""
    return "bmm" if shutil.which("bmm") else os.path.relpath(Path(sys.executable).with_name("bmm"))

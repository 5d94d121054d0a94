"""The frame of a page: one self-contained HTML file, light or dark, for a desk or a phone; and its pictures as files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bmm_engine.disk.files import is_file, named, write_whole
from bmm_engine.errors import OutputExistsError, OutputWriteError
from bmm_engine.report.figures import Chart, Look, render

STYLE = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")

# What every page begins with, by which it is known for ours.
_HEAD = (
    "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    "<meta name='color-scheme' content='light dark'>"
)


def document(title: str, parts: Iterable[str]) -> str:
    """The HTML of a page."""
    return (
        f"{_HEAD}<title>{escape(title)}</title><link rel='icon' href='data:,'><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def save(folder: Path, page: str, pictures: Sequence[Chart]) -> Path:
    """Write `report.html`, and a PNG for each picture, into `folder`; the path of the page.

    An earlier report there is replaced, nothing else: pictures are known for ours by the page beside them, which is written first. Raises
    `OutputExistsError`, `OutputWriteError`.
    """
    path = folder / "report.html"
    files = [path, *(folder / f"{chart.name}.png" for chart in pictures)]
    taken = [file.name for file in files if os.path.lexists(file)]
    if taken and not _is_report(path):
        raise OutputExistsError(
            f"{folder}: holds {named(taken)} of something else than a report by this engine; choose another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, page.encode())
        for chart, file in zip(pictures, files[1:], strict=True):
            write_whole(file, render(chart, Look(dark=False, narrow=False), "png"))
    except OSError as error:
        raise OutputWriteError(f"{folder}: the report cannot be written there ({error}). Choose a folder.") from error
    return path


def _is_report(path: Path) -> bool:
    try:
        if not is_file(path):
            return False
        with path.open("rb") as file:
            return file.read(len(_HEAD)) == _HEAD.encode()
    except OSError:
        return False


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers on the right; scrolls within its own box."""
    titles = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines = ("".join(f"<td{_kind(cell)}>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<div class='scroll'><table><thead><tr>{titles}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table></div>"


def _kind(cell: Any) -> str:
    text = str(cell)
    return " class='n'" if text[:1].isdigit() or text[:1] in "-∞" else ""

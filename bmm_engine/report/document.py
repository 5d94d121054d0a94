"""The frame of a page: one self-contained HTML file, light or dark, for a desk or a phone; and its pictures as files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bmm_engine.errors import OutputWriteError
from bmm_engine.report.figures import Chart, Look, render

STYLE = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")


def document(title: str, parts: Iterable[str]) -> str:
    """The HTML of a page."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{escape(title)}</title><link rel='icon' href='data:,'><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def save(folder: Path, page: str, pictures: Sequence[Chart]) -> Path:
    """Write `report.html`, and a PNG for each picture, into `folder`; the path of the page. Raises `OutputWriteError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputWriteError(f"{folder}: the report cannot be written there ({error}). Choose a folder.") from error
    for chart in pictures:
        write_bytes(folder / f"{chart.name}.png", render(chart, Look(dark=False, narrow=False), "png"))
    path = folder / "report.html"
    write_bytes(path, page.encode())
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers on the right; scrolls within its own box."""
    titles = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines = ("".join(f"<td{_kind(cell)}>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<div class='scroll'><table><thead><tr>{titles}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table></div>"


def _kind(cell: Any) -> str:
    text = str(cell)
    return " class='n'" if text[:1].isdigit() or text[:1] in "-∞" else ""

"""Texts and rows of files that people give: `.txt`, `.jsonl`, `.csv`, `.tsv`. What is no text is an error with its line, never the word for it."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bmm_engine.errors import ConfigError, cut, listed, shown
from bmm_engine.statistics.text_file import opened_text, parse_json

# No tokenizer is made for these, and UTF-8 has no lone surrogates.
_UNWANTED = re.compile("[\0\ud800-\udfff]")


class Row(dict[str, Any]):
    """Column -> value, and `where` it stands: file and line."""

    where = ""


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file. Raises `ConfigError`."""
    with opened_text(path) as file:
        for number, line in enumerate(file, 1):
            yield text_of(line.rstrip("\n"), f"{path}, line {number}", "text")


def read_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """The rows of a `.jsonl`, `.csv` or `.tsv` file (without quoting), each with the columns `fields` at least. Raises `ConfigError`."""
    kinds = {".jsonl": _json_rows, ".csv": _csv_rows, ".tsv": _tsv_rows}
    kind = path.suffix.lower()
    if kind not in kinds:
        raise ConfigError(f"{path} is of a kind that is not read; use .txt, .jsonl, .tsv, .csv or .safetensors.")
    yield from kinds[kind](path, fields)


def text_of(value: Any, where: str, field: str) -> str:
    """A cell that must be text. Raises `ConfigError` for anything else, and for text that holds what is no character."""
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: {shown(field)} is {_kind(value)}, not text ({shown(value)}). Put it into quotes if it is meant, or leave the row out."
        )
    if unwanted := _UNWANTED.search(value):
        raise ConfigError(
            f"{where}: {shown(field)} holds {unwanted[0]!r}, which is no character of a text. Is it a binary, or wrongly decoded? Remove it."
        )
    return value


def label_of(value: Any, where: str, field: str) -> str | int:
    """A cell that must be a label: a class number, or a name. Raises `ConfigError`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or not value.strip():
        kind = "empty" if isinstance(value, str) else _kind(value)
        raise ConfigError(
            f"{where}: {shown(field)} is {kind} ({shown(value)}); a label is a class number or a name. Correct it, or leave the row out."
        )
    return text_of(value, where, field)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    kinds = {type(None): "null", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), type(value).__name__)


def _json_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    with opened_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                value = parse_json(line, where)
                if not isinstance(value, dict):
                    raise ConfigError(f"{where} is {_kind(value)}; a line is a mapping with {listed(fields)}.")
                _check_columns(list(value), fields, where)
                yield _row(value, where)


def _csv_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    with opened_text(path, newline="") as file:
        lines = csv.reader(file, strict=True)  # or a text after a closing quote would be glued to it
        header: list[str] | None = None
        while True:
            first = lines.line_num + 1
            try:
                cells = next(lines, None)
            except (
                csv.Error
            ) as error:  # a quote that is not closed, or closed too early; a field longer than csv's limit
                raise ConfigError(
                    f"{path}, line {first}: not valid CSV ({cut(str(error))}). Close the quote, and double those inside of a"
                    " text; of very long texts, use .jsonl."
                ) from error
            if cells is None:
                return
            if header is None:
                header = cells
                _check_columns(header, fields, str(path))
            elif cells:
                where = f"{path}, line {first}"
                if len(cells) != len(header):
                    raise _ragged(where, cells, header)
                yield _row(dict(zip(header, cells, strict=True)), where)


def _tsv_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    with opened_text(path) as file:
        header: list[str] | None = None
        for number, line in enumerate(file, 1):
            line = line.rstrip("\n")
            if header is None:
                header = line.split("\t")
                _check_columns(header, fields, str(path))
                continue
            if not line and len(header) > 1:
                continue
            # Text may hold tabs where its column is the last.
            cells = line.split("\t", len(header) - 1)
            where = f"{path}, line {number}"
            if len(cells) != len(header):
                raise _ragged(where, cells, header)
            yield _row(dict(zip(header, cells, strict=True)), where)


def _check_columns(has: Sequence[str], fields: Sequence[str], where: str) -> None:
    for field in fields:
        if field not in has:
            raise ConfigError(
                f"{where} has no column {shown(field)} (it has: {listed(has) or 'none'}). Name the column of texts with `field`, of labels with"
                " `label_field`."
            )
        if has.count(field) > 1:
            raise ConfigError(f"{where}: the column {shown(field)} is there {has.count(field)} times; keep one.")


def _ragged(where: str, cells: Sequence[str], header: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{where}: {len(cells)} cells under {len(header)} columns ({listed(header)}). Complete the row, quote what holds a separator, or leave the"
        " row out."
    )


def _row(values: dict[str, Any], where: str) -> Row:
    row = Row(values)
    row.where = where
    return row

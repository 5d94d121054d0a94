"""Files that people give, as text: one guard where they are opened. What is no regular file is refused unopened: a FIFO would be waited for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from bmm_engine.disk.reading import irregular, unique_keys
from bmm_engine.errors import ConfigError, cut, shown

# Linux's limits; others are as narrow.
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
_SPARE = 48


def check_path(path: str | os.PathLike[str], key: str, spare: int = 0) -> None:
    """Raise `ConfigError` for a path that no file can have, or whose name could not be written down in UTF-8. `key`: what names it. `spare`: bytes
    that are to be left for longer names beside it."""
    text = os.fspath(path)
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise ConfigError(
            f"{key}: the path {shown(text)} is not UTF-8, and could not be written into a record; rename the file or the folder."
        ) from None
    if not text or "\0" in text:
        what = "holds a zero byte" if text else "is empty"
        raise ConfigError(f"{key}: the path {shown(text)} {what}; name a file or a folder.")
    longest = max(len(part.encode()) for part in text.split("/"))
    most, most_of_name = _LONGEST_PATH - spare, _LONGEST_NAME - spare
    if size > most or longest > most_of_name:
        raise ConfigError(
            f"{key}: the path {shown(text)} is too long ({size} bytes, its longest name {longest}); a path may have {most} bytes, a name"
            f" {most_of_name}. Is it a text in the place of a path?"
        )


def check_output_path(path: str | os.PathLike[str]) -> None:
    """`check_path` for what is to be written, with longer names beside it: a study, a walk, what is not finished."""
    check_path(path, "the output", spare=_SPARE)


def check_regular(path: Path, what: str = "the file") -> int:
    """The size in bytes of a regular file, or one that a link leads to. Raises `ConfigError` for anything else, without opening it."""
    check_path(path, what)
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, what, error) from error
    if kind := irregular(found):
        raise ConfigError(
            f"{path}: {what} cannot be read (it is {kind}). Give a regular file; save what it gives as one."
        )
    return found.st_size


@contextmanager
def opened_text(path: Path, what: str = "the file", newline: str | None = None) -> Iterator[TextIO]:
    """The file, to be read as UTF-8 without its byte-order mark. Raises `ConfigError`, also for what is read inside that is no UTF-8."""
    check_regular(path, what)
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except OSError as error:
        raise unreadable(path, what, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(_not_utf8(path, what)) from error


def read_text(path: Path, what: str, most_bytes: int) -> str:
    """The whole of a small file, without its byte-order mark. Raises `ConfigError`, for one larger than `most_bytes` too."""
    size = check_regular(path, what)
    if size > most_bytes:
        raise ConfigError(
            f"{path}: {what} has {size} bytes, and at most {most_bytes} are read. Is it another file than was meant?"
        )
    with opened_text(path, what) as file:
        return file.read()


def read_json(path: Path, what: str, most_bytes: int = 1 << 28) -> Any:
    """A JSON file's value. Raises `ConfigError`."""
    return parse_json(read_text(path, what, most_bytes), str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises `ConfigError`, for keys that are there twice too."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ConfigError(f"{where}: cannot be read (it nests too deeply). It must be plain JSON.") from None
    except ValueError as error:  # of JSON, and of integers with thousands of digits
        raise ConfigError(
            f"{where}: cannot be read ({cut(str(error))}). It must be UTF-8 text of valid JSON, each key once."
        ) from error


def unreadable(path: Path, what: str, error: Exception) -> ConfigError:
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return ConfigError(f"{path}: {what} cannot be read ({reason}). Check the path and its permissions.")


def _not_utf8(path: Path, what: str) -> str:
    """The message for a file that is no UTF-8: the first such line, and what it may be instead."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                utf16 = number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff"))
                hint = "it looks like UTF-16" if utf16 else f"byte 0x{line[error.start]:02x} at {error.start + 1}"
                return f"{path}, line {number}: {what} cannot be read ({hint}). It must be UTF-8 text; save it as that."
    return f"{path}: {what} cannot be read (it is cut within a character). It must be UTF-8 text; save it as that."

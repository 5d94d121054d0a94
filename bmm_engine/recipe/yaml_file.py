"""YAML as recipes are written in it: the core rules of YAML 1.2, read strictly, so that a file means what it seems to.

Text is text: `1:30`, `yes`, `2024-01-01` and `0b1` are; `1e-3` is a number, `0777` is 777, `0o17` is 15, true and false are booleans, `.inf` is
infinity. Keys are text, each once in its mapping. One document, without tags or merge keys, with few aliases, of bounded size and depth.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from bmm_engine.errors import ConfigError, cut, shown
from bmm_engine.statistics.text_file import read_text

MOST_BYTES = 2 << 20
MOST_VALUES = 100_000  # with what aliases repeat
MOST_ALIASES = 16
MOST_DEPTH = 32
LARGEST_INTEGER = 2**53  # exact in any number format

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
# Of no use in names and paths, and able to steer a terminal; a lone surrogate is no character at all.
_UNWANTED = re.compile("[\0-\b\v\f\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def load_yaml(path: Path, what: str = "the recipe") -> Any:
    """The plain value of a YAML file: dicts with text as keys, lists, text, numbers, booleans, None. Raises `ConfigError` with file and line."""
    return parse_yaml(read_text(path, what, MOST_BYTES), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The plain value of a YAML text; `where` it is from. Raises `ConfigError`."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        return loader.document()
    except _Refused as error:
        raise ConfigError(f"{where}, line {error.line}: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        tab = " Indent with spaces, not tabs." if "'\\t'" in str(error.problem) else ""
        problem = cut(", ".join(filter(None, (error.context, error.problem))))
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}.{tab} Correct the file there.") from error
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{where}, line {number}: not valid YAML: the character {error.character!r} may not stand there; remove it. Is it a binary file?"
        ) from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        line = "" if loader is None else f", line {loader.line + 1}"
        raise ConfigError(f"{where}{line}: not valid YAML: {cut(str(error))}. Correct the file there.") from error


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `load_yaml`, and a reader by the rules of YAML 1.1, read as the same."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False))


class _Refused(Exception):
    """Valid YAML that a recipe may not have."""

    def __init__(self, mark: Any, reason: str):
        super().__init__(reason)
        self.line, self.reason = mark.line + 1, reason


class _Loader(yaml.SafeLoader):
    """PyYAML's parser, with nodes checked as they are composed, and values by the core rules."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0
        self._aliases = 0
        self._values = 0
        self._open: set[str] = set()  # anchors of what is not complete
        self._sizes: dict[int, int] = {}  # node -> how many values it holds

    def document(self) -> Any:
        if not self.check_event(yaml.StreamStartEvent):
            raise ValueError("there is no stream")
        self.get_event()
        if self.check_event(yaml.StreamEndEvent):
            return None
        node = self.compose_document()
        if not self.check_event(yaml.StreamEndEvent):
            raise _Refused(
                self.peek_event().start_mark, "a second document begins here; keep one (without a `---` between)."
            )
        return self._value(node)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, parent, index)
        if event.tag is not None:
            raise _Refused(event.start_mark, f"the tag {shown(event.tag)} is not read; write the plain value.")
        if self._depth == MOST_DEPTH:
            raise _Refused(event.start_mark, f"it nests more than {MOST_DEPTH} deep; a recipe needs far less.")
        self._count(1, event)
        before = self._values
        if event.anchor is not None:
            self._open.add(event.anchor)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._open.discard(event.anchor)
        self._sizes[id(node)] = self._values - before + 1
        return node

    def _alias(self, event: Any, parent: Any, index: Any) -> Any:
        name = shown(event.anchor)
        if event.anchor in self._open:
            raise _Refused(event.start_mark, f"the alias {name} stands inside of what it repeats; write the value out.")
        self._aliases += 1
        if self._aliases > MOST_ALIASES:
            raise _Refused(
                event.start_mark, f"the alias {name} is one of more than {MOST_ALIASES}; write the values out."
            )
        if event.anchor in self.anchors:  # else PyYAML says so
            self._count(self._sizes[id(self.anchors[event.anchor])], event)
        return super().compose_node(parent, index)

    def _count(self, values: int, event: Any) -> None:
        self._values += values
        if self._values > MOST_VALUES:
            raise _Refused(event.start_mark, f"it holds more than {MOST_VALUES} values; a recipe needs far less.")

    def _value(self, node: Any) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item) for item in node.value]
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = self._key(key_node), key_node.start_mark.line + 1
            if key in found:
                raise _Refused(
                    key_node.start_mark,
                    f"the key {shown(key)} is there twice, on line {lines[key]} and on line {line}; keep one.",
                )
            found[key], lines[key] = self._value(value_node), line
        return found

    def _key(self, node: Any) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise _Refused(node.start_mark, "a list or a mapping is no key; keys are text.")
        key = self._scalar(node)
        if not isinstance(key, str):
            raise _Refused(node.start_mark, f"the key {shown(key)} is no text; put it into quotes if it is meant.")
        if key == "<<" and node.style is None:
            raise _Refused(node.start_mark, "merge keys (<<) are not of YAML 1.2; write the keys out.")
        return key

    def _scalar(self, node: Any) -> Any:
        text = node.value
        if unwanted := _UNWANTED.search(text):
            raise _Refused(node.start_mark, f"the text {shown(text)} holds the character {unwanted[0]!r}; remove it.")
        if node.style is not None:
            return text
        if text in _NULL:
            return None
        if text in _BOOLEANS:
            return _BOOLEANS[text]
        if _INTEGER.fullmatch(text) or _OCTAL.fullmatch(text) or _HEXADECIMAL.fullmatch(text):
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            found = int(text, base) if len(text) < 100 else LARGEST_INTEGER + 1
            if abs(found) > LARGEST_INTEGER:
                raise _Refused(
                    node.start_mark,
                    f"the number {shown(text)} is too large; integers go to 2^53. Put it into quotes if it is text.",
                )
            return found
        if _FLOAT.fullmatch(text):
            number = float(text)
            if math.isinf(number):
                raise _Refused(node.start_mark, f"the number {shown(text)} is too large; infinity is written .inf.")
            return number
        if _INFINITY.fullmatch(text):
            return -math.inf if text.startswith("-") else math.inf
        return math.nan if _NAN.fullmatch(text) else text


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else; repeats values in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in (
    ("int", re.compile(f"^(?:{_INTEGER.pattern}|{_OCTAL.pattern}|{_HEXADECIMAL.pattern})$"), "-+0123456789"),
    ("float", re.compile(f"^(?:{_FLOAT.pattern})$"), "-+.0123456789"),
):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))

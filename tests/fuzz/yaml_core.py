"""YAML as the core schema of version 1.2 has it, every key once: what a recipe says."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.fuzz.case import Invalid, Unjudged

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE, _FALSE = re.compile(r"true|True|TRUE"), re.compile(r"false|False|FALSE")
_INT, _OCTAL, _HEX = re.compile(r"[-+]?[0-9]+"), re.compile(r"0o[0-7]+"), re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY, _NAN = re.compile(r"[-+]?\.(inf|Inf|INF)"), re.compile(r"\.(nan|NaN|NAN)")
_MOST_ALIASES, _MOST_NODES, _DEEPEST = 100, 20_000, 60


def parse_yaml(content: bytes) -> Any:
    """The one document of a file. Raises `Invalid`, and `Unjudged` for what the core schema leaves to applications."""
    try:
        text = content.decode("utf-8-sig")
        aliases = sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader))
        if aliases > _MOST_ALIASES:
            raise Invalid(f"{aliases} aliases")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        raise Invalid(f"no YAML: {str(error).splitlines()[0]}") from None
    return None if node is None else _value(node, 0, [0])


def _value(node: yaml.Node, depth: int, count: list[int]) -> Any:
    count[0] += 1
    if depth > _DEEPEST or count[0] > _MOST_NODES:
        raise Invalid("too deep or too large")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise Unjudged(f"the tag {node.tag}")
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, depth + 1, count) for item in node.value]
    found: dict[Any, Any] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value == "<<":
            raise Unjudged("a merge key")
        name = _value(key, depth + 1, count)
        if isinstance(name, (list, dict)):
            raise Invalid("a key that is no scalar")
        if name in found:
            raise Invalid(f"the key {str(name)[:40]!r} twice")
        found[name] = _value(value, depth + 1, count)
    return found


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    if node.style is not None or (node.tag == "tag:yaml.org,2002:str" and not _is_number(text)):
        return text
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return bool(_TRUE.fullmatch(text))
    if _INT.fullmatch(text) or _OCTAL.fullmatch(text) or _HEX.fullmatch(text):
        digits = len(text)
        if digits > 4000:
            raise Invalid("a number of thousands of digits")
        return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITY.fullmatch(text) or _NAN.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def _is_number(text: str) -> bool:
    return any(pattern.fullmatch(text) for pattern in (_INT, _OCTAL, _HEX, _FLOAT))

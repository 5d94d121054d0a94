"""Mutations of text files: of bytes, of lines, and of values in a JSON tree."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

# Texts that stand where a value of JSON does.
ODD_JSON = (
    "null", "true", "false", "0", "-1", "1", "2", "1.5", "1e308", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1000000000", "-1000000000",
    "1000000000000000000000", str(10**400), '""', '"x"', '"1"', '"true"', '"[b]bold[/b]"', '"\\ud800"', '"\\u0000"', '"../x"', '"/etc/passwd"',
    "[]", "{}", "[1, 2]", '["a"]', '{"a": 1}', "[[[[1]]]]", "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, '"' + "y" * 100_000 + '"',
)  # fmt: skip
_SNIPPETS = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\n\n", b"\t", b" ", b"\"", b"'", b",", b":", b"{", b"}", b"[", b"]", b"NaN", b"null",
    b"1e999", b"-", b"#", b"&a ", b"*a", b"!!python/object/apply:os.getcwd []", b"\\", b"\xc3", b"\xf0\x9f\x98\x80", b"\xe2\x80\xa8", b"A" * 5000,
)  # fmt: skip


def mutate_bytes(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """One change of a few bytes or lines."""
    at = rng.randrange(len(content) + 1)
    action = rng.randrange(8)
    if action == 0:
        snippet = rng.choice(_SNIPPETS)
        return f"insert {snippet[:20]!r} at {at}", content[:at] + snippet + content[at:]
    if action == 1:
        count = rng.choice((1, 1, 2, 5, 40))
        return f"delete {count} bytes at {at}", content[:at] + content[at + count :]
    if action == 2:
        return f"cut at {at}", content[:at]
    if action == 3 and content:
        at = min(at, len(content) - 1)
        byte = rng.randrange(256)
        return f"byte {at} becomes {byte:#x}", content[:at] + bytes([byte]) + content[at + 1 :]
    if action == 4:
        lines = content.splitlines(keepends=True) or [b""]
        line = rng.randrange(len(lines))
        return f"line {line + 1} twice", b"".join([*lines[: line + 1], *lines[line:]])
    if action == 5:
        lines = content.splitlines(keepends=True) or [b""]
        line = rng.randrange(len(lines))
        return f"without line {line + 1}", b"".join([*lines[:line], *lines[line + 1 :]])
    if action == 6:
        return "a byte-order mark in front", b"\xef\xbb\xbf" + content
    codec = rng.choice(("utf-16", "utf-32", "latin-1"))
    return f"as {codec}", (content.decode("utf-8", "replace") + "é").encode(codec, "replace")


def paths_of(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON tree."""
    yield here
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths_of(value, (*here, key))


def mutate_json(rng: random.Random, tree: Any, keys: tuple[str, ...] = ()) -> tuple[str, str]:
    """A JSON text with one change of a value or key; `keys`: those that are tried more often."""
    places = [path for path in paths_of(tree) if path]
    often = [path for path in places if path[0] in keys]
    path = rng.choice(often if often and rng.random() < 0.6 else places)
    where = "/".join(map(str, path))
    action = rng.randrange(10)
    if action < 6:
        odd = rng.choice(ODD_JSON)
        return f"{where} becomes {odd[:30]}", edited(tree, path, odd)
    if action == 6:
        return f"without {where}", edited(tree, path, None)
    if action == 7:
        odd = rng.choice(ODD_JSON)
        return f"{where} twice, at last {odd[:30]}", edited(tree, path, odd, twice=True)
    if action == 8:
        key = rng.choice(("extra", "", "[/x]", "\ud800", "x" * 3000, "num_hidden_layer"))
        odd = rng.choice(ODD_JSON)
        return f"new key {key[:20]!r}: {odd[:30]}", edited({**tree, key: 0}, (key,), odd)
    odd = rng.choice((0.5, 2, 10, 1000))
    value = at(tree, path)
    number = json.dumps(value * odd) if isinstance(value, (int, float)) and not isinstance(value, bool) else "3"
    return f"{where} becomes {number}", edited(tree, path, number)


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def edited(tree: Any, path: tuple[Any, ...], text: str | None, *, twice: bool = False) -> str:
    """The JSON text of a tree in which what is at `path` is written as `text` (None: left out); `twice`: beside what it was."""
    if not path:
        assert text is not None
        return text
    parts = []
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    for key, value in items:
        name = f"{json.dumps(key)}: " if isinstance(tree, dict) else ""
        if key != path[0]:
            parts.append(name + json.dumps(value))
            continue
        if twice and len(path) == 1:
            parts.append(name + json.dumps(value))
        if len(path) > 1:
            parts.append(name + edited(value, path[1:], text, twice=twice))
        elif text is not None:
            parts.append(name + text)
    opening, closing = "{}" if isinstance(tree, dict) else "[]"
    return opening + ", ".join(parts) + closing


def harmless_json(rng: random.Random, tree: Any) -> tuple[str, str]:
    """The same values, written otherwise."""
    if rng.random() < 0.5 and isinstance(tree, dict):
        keys = list(tree)
        rng.shuffle(keys)
        return "the same keys in another order", json.dumps({key: tree[key] for key in keys})
    indent = rng.choice((None, 1, 8, "\t"))
    return f"the same with indent {indent!r}", "\n" * rng.randrange(3) + json.dumps(tree, indent=indent) + "\n\n"

"""Mutations of safetensors files: of the data, of the header's JSON, and of how the two fit."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from tests.fuzz.text import ODD_JSON, edited, mutate_bytes

_ODD_NAMES = ("", "x", "[/red]", "a/b", "..", "\x00", "é", "\ud800", "n" * 5000, "__metadata__")
_LENGTHS = (0, 1, 7, 2**31, 2**32 + 5, 2**62, 2**63, 2**64 - 1, 100_000_001)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: dict[str, Any] | str, data: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + data


def mutate_tensors(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """One change of a file that is well formed."""
    actions = (
        _data,
        _data,
        _value,
        _raw,
        _length,
        _ends,
        _entry,
        _entry,
        _odd_entry,
        _odd_entry,
        _names,
        _twice,
        _metadata,
        _swap,
        _padding,
    )
    return rng.choice(actions)(rng, content)


def _data(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    header, data = split(content)
    at, byte = rng.randrange(len(data)), rng.randrange(256)
    return f"data byte {at} becomes {byte:#x}", joined(header, data[:at] + bytes([byte]) + data[at + 1 :])


def _value(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    header, data = split(content)
    name = _some(rng, header)
    begin, end = header[name]["data_offsets"]
    value = rng.choice((float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1e38, 1e-45))
    if end - begin < 4:
        return _data(rng, content)
    at = begin + 4 * rng.randrange((end - begin) // 4)
    packed = struct.pack("<f", value)
    if rng.random() < 0.3:
        return f"{name} is {value} everywhere", joined(
            header, data[:begin] + packed * ((end - begin) // 4) + data[end:]
        )
    return f"{name} holds {value}", joined(header, data[:at] + packed + data[at + 4 :])


def _raw(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    return mutate_bytes(rng, content)


def _length(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    length = rng.choice((*_LENGTHS, len(content), len(content) - 8, int.from_bytes(content[:8], "little") - 1))
    return f"announces a header of {length} bytes", length.to_bytes(8, "little") + content[8:]


def _ends(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    count = rng.choice((1, 4, 7, 8, 100, len(content) // 2))
    if rng.random() < 0.5:
        return f"{count} bytes short", content[:-count]
    return f"{count} bytes too long", content + bytes(count)


def _entry(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Another dtype, shape or offset, as whole numbers that may fit."""
    header, data = split(content)
    name = _some(rng, header)
    entry = header[name]
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    action = rng.randrange(6)
    if action == 0:
        entry["dtype"] = rng.choice(
            ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "E8M0", "f32")
        )
        if rng.random() < 0.7:  # of a size that fits
            size = {"F64": 8, "I64": 8, "C64": 8, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1}.get(
                entry["dtype"], 4
            )
            entry["shape"] = [(end - begin) // size]
    elif action == 1:
        entry["shape"] = shape[::-1]
    elif action == 2:
        entry["shape"] = [*shape, 1] if rng.random() < 0.5 else [1, *shape]
    elif action == 3:
        entry["shape"] = rng.choice(([], [0], [10**9], [10**18, 10**18], [-1], [end - begin], [2**63, 2], [1] * 3000))
    elif action == 4:
        entry["data_offsets"] = rng.choice(
            ([0, end - begin], [begin + 4, end + 4], [end, begin], [begin, end + 4], [0, 10**18], [begin, begin])
        )
    else:
        entry["shape"] = [max(0, size + rng.choice((-1, 1))) for size in shape]
    return f"{name}: {json.dumps(entry)[:120]}", joined(header, data)


def _odd_entry(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Any JSON where the header has a value."""
    header, data = split(content)
    name = _some(rng, header)
    path = rng.choice(
        (
            (name,),
            (name, "dtype"),
            (name, "shape"),
            (name, "data_offsets"),
            (name, "shape", 0),
            (name, "data_offsets", 0),
            (name, "data_offsets", 1),
        )
    )
    odd = rng.choice((*ODD_JSON, None))
    return f"{'/'.join(map(str, path))} becomes {str(odd)[:30]}", joined(edited(header, path, odd), data)


def _names(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    header, data = split(content)
    name = _some(rng, header)
    new = rng.choice((*_ODD_NAMES, name + "x", name.upper(), f"model.{name}", name.replace(".", "/")))
    return f"{name} is called {new[:40]!r}", joined(
        {new if key == name else key: value for key, value in header.items()}, data
    )


def _twice(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """One name in the header twice: the same entry, or another tensor's."""
    header, data = split(content)
    name, other = _some(rng, header), _some(rng, header)
    return f"{name} twice, at last as {other}", joined(
        edited(header, (name,), json.dumps(header[other]), twice=True), data
    )


def _metadata(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    header, data = split(content)
    odd = rng.choice((*ODD_JSON, '{"format": "pt", "format": "tf"}', '{"a": 1}', '{"format": "pt"}'))
    return f"metadata {odd[:40]}", joined(edited({**header, "__metadata__": 0}, ("__metadata__",), odd), data)


def _swap(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Two tensors' names exchanged, or their places."""
    header, data = split(content)
    first, second = _some(rng, header), _some(rng, header)
    if rng.random() < 0.5:
        header[first], header[second] = header[second], header[first]
        return f"{first} and {second} exchanged", joined(header, data)
    header[first]["data_offsets"] = header[second]["data_offsets"]
    return f"{first} lies where {second} does", joined(header, data)


def _padding(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    header, data = split(content)
    text = json.dumps(header)
    text = rng.choice((f" {text}", f"{text}   ", f"{text}\n", f"{text}\0", f"\ufeff{text}", f"{text}{{}}", f"[{text}]"))
    return f"header {text[:3]!r} ... {text[-3:]!r}", joined(text, data)


def _some(rng: random.Random, header: dict[str, Any]) -> str:
    return rng.choice([name for name in header if name != "__metadata__"])

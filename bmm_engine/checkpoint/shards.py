"""Which tensor goes where: shards, file names, headers and byte offsets, all known before the first byte is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bmm_engine.checkpoint.safetensors_io import MAX_HEADER_BYTES, TAGS
from bmm_engine.checkpoint.source import TensorSpec
from bmm_engine.errors import ConfigError, shown

INDEX_FILENAME = "model.safetensors.index.json"
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000 ** (power + 1) for power, prefix in enumerate("KMGT")}
_UNITS |= {f"{prefix}IB": 1024 ** (power + 1) for power, prefix in enumerate("KMGT")}


@dataclass(frozen=True)
class Shard:
    """One file to write: its bytes up to the data, the offset in the file at which each tensor starts, and its size."""

    file: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def parse_size(size: int | str) -> int:
    """Bytes of `"5GB"` (10^9), `"512MiB"` (2^20), `"1.5 gb"` or a positive integer. Raises ConfigError."""
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)", size.strip())
        unit = _UNITS.get(match[2].upper()) if match else None
        nbytes = int(float(match[1]) * unit) if match and unit else 0
    else:
        nbytes = size if type(size) is int else 0
    if nbytes < 1:
        raise ConfigError(
            f"size {shown(size)} is not a positive number of bytes; write it as 5GB, 512MiB or 5000000000"
        )
    return nbytes


def plan_shards(
    specs: Sequence[TensorSpec], max_shard_bytes: int, metadata: Mapping[str, str] | None = None
) -> tuple[Shard, ...]:
    """Fill shards in the order of `specs`; a tensor larger than `max_shard_bytes` has a shard of its own.

    Raises ConfigError for no tensors, a name twice, a dtype that safetensors lacks, or metadata that is not text.
    """
    _check_specs(specs)
    text = {"format": "pt", **(metadata or {})}
    if not all(isinstance(item, str) for pair in text.items() for item in pair):
        raise ConfigError(
            f"safetensors metadata must map text to text, got {dict(metadata or {})!r}; convert the values with str()"
        )
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return (_shard("model.safetensors", groups[0], text),)
    count = len(groups)
    return tuple(
        _shard(f"model-{number:05d}-of-{count:05d}.safetensors", group, text)
        for number, group in enumerate(groups, start=1)
    )


def index_json(shards: Sequence[Shard], specs: Sequence[TensorSpec]) -> dict[str, object]:
    """The content of model.safetensors.index.json."""
    file_of = {name: shard.file for shard in shards for name in shard.offsets}
    return {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
        "weight_map": {spec.name: file_of[spec.name] for spec in specs},
    }


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    if not specs:
        raise ConfigError("no tensors to write; pass the spec of at least one")
    seen = set()
    for spec in specs:
        if spec.name in seen:
            raise ConfigError(f"tensor {spec.name!r} is listed twice; each name is written once")
        if spec.name == "__metadata__":
            raise ConfigError("the safetensors format keeps the name '__metadata__' for itself; rename the tensor")
        if spec.dtype not in TAGS:
            raise ConfigError(
                f"tensor {spec.name!r}: safetensors cannot store {spec.dtype}; cast it to one of "
                f"{', '.join(map(str, TAGS))}"
            )
        seen.add(spec.name)


def _shard(file: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    # Wide dtypes first: with the header padded to 8 bytes every tensor is then aligned to its own element size.
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begins = {}
    position = 0
    for spec in ordered:
        begins[spec.name] = position
        entries[spec.name] = {
            "dtype": TAGS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ConfigError(
            f"{file}: its header would have {len(text)} bytes, the format allows {MAX_HEADER_BYTES}; use smaller shards"
        )
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + position)

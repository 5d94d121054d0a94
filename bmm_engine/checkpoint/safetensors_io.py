"""The safetensors format: headers checked before they are trusted, reads of one tensor or a range of its rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bmm_engine.checkpoint.layout import check_weight_file, file_stamp
from bmm_engine.checkpoint.source import TensorSpec, row_span
from bmm_engine.disk.reading import unique_keys
from bmm_engine.errors import CheckpointError

_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}
DTYPES: dict[str, torch.dtype] = {
    tag: getattr(torch, name) for tag, name in _TORCH_NAMES.items() if hasattr(torch, name)
}
TAGS: dict[torch.dtype, str] = {dtype: tag for tag, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the library's own limit


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class SafetensorsFile:
    """One checked file: specs in offset order, where each tensor's bytes start, and the texts in its header."""

    path: Path
    specs: dict[str, TensorSpec]
    offsets: dict[str, int]
    stamp: tuple[int, int, int]
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read and check the header. Raises CheckpointError for a truncated or malformed file and an unknown dtype."""
        check_weight_file(path)
        with path.open("rb") as file:
            stamp = file_stamp(file.fileno())
            header, metadata, data_start = _read_header(path, file.read(8), file, stamp[0])
        entries = sorted(_entries(path, header), key=lambda entry: entry[:2])
        described = data_start + max((end for _, end, _ in entries), default=0)
        if described != stamp[0]:
            problem = "is truncated" if described > stamp[0] else "has bytes that its header does not describe"
            raise CheckpointError(
                f"{path}: {problem}: the header describes a file of {described} bytes, this one has {stamp[0]}; "
                "download it again"
            )
        specs = {spec.name: spec for _, _, spec in entries}
        offsets = {spec.name: data_start + begin for begin, _, spec in entries}
        _check_no_gaps(path, entries, stamp[0])
        return cls(path, specs, offsets, stamp, metadata)

    @property
    def aliases(self) -> dict[str, str]:
        return {}

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor, or a range of its rows, in fresh memory. Raises CheckpointError when the file has changed."""
        # Plain reads, not a mapping: pages of a mapped file count as resident memory of this process and stay after
        # the tensor is gone, so a merge that maps its inputs seems to grow to the size of all experts together.
        spec, offset, shape = self.specs[name], self.offsets[name], self.specs[name].shape
        if rows is not None:
            start, stop = row_span(name, shape, rows)
            shape = (stop - start, *shape[1:])
            offset += start * math.prod(shape[1:]) * spec.dtype.itemsize
        tensor = torch.empty(shape, dtype=spec.dtype)
        read_into(byte_view(tensor), self.path, offset, self.stamp, name)
        return tensor


def read_into(view: memoryview, path: Path, offset: int, stamp: tuple[int, int, int], name: str) -> None:
    """Fill `view` with the bytes of the tensor `name` from `offset` on. Raises CheckpointError where the file is not that of the `stamp`, or ends."""
    try:
        with path.open("rb", buffering=0) as file:
            if file_stamp(file.fileno()) != stamp:
                raise changed(path)
            file.seek(offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])  # the system reads at most 2 GiB at once
                if not count:
                    raise CheckpointError(
                        f"{path}: ends after {done} of the {len(view)} bytes of tensor {name!r}; download it again"
                    )
                done += count
    except OSError as error:
        raise CheckpointError(f"{path}: tensor {name!r} cannot be read ({error.strerror})") from error


def changed(path: Path) -> CheckpointError:
    """The error for a file that is no more the one that was opened."""
    return CheckpointError(f"{path}: changed on disk since it was opened; start again once it is whole")


def _read_header(
    path: Path, length_bytes: bytes, file: Any, file_bytes: int
) -> tuple[dict[str, Any], dict[str, str], int]:
    """The parsed header, the texts in it, and the offset at which tensor data starts."""
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < 8 or length > min(file_bytes - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: is no safetensors file or is truncated: its first 8 bytes announce a header of {length} bytes, "
            f"the file has {file_bytes}; download it again"
        )
    try:
        text = file.read(length).decode("utf-8")
        header = json.loads(text, object_pairs_hook=unique_keys)
        if isinstance(header, dict) and not text.startswith("{"):  # the format's own rule
            raise ValueError("it does not begin with '{'")
    except (ValueError, RecursionError) as error:  # ValueError also for what is not UTF-8
        raise CheckpointError(f"{path}: the safetensors header is malformed ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object; download it again")
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        return header, {}, 8 + length
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the metadata in its header is no map from names to texts; download it again")
    return header, metadata, 8 + length


def _shortened(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:100]} ..."


def _check_no_gaps(path: Path, entries: list[tuple[int, int, TensorSpec]], file_bytes: int) -> None:
    """The tensors lie one behind the other, from the first byte of the data on: no hole, no byte of two tensors."""
    expected, before = 0, "the header"
    for begin, end, spec in entries:
        if begin != expected:
            raise CheckpointError(
                f"{path}: is not a valid safetensors file of {file_bytes} bytes (tensor {spec.name!r} begins at byte {begin} "
                f"of the data, {before} ends at {expected}); download it again"
            )
        expected, before = end, f"tensor {spec.name!r}"


def _entries(path: Path, header: dict[str, Any]) -> Iterable[tuple[int, int, TensorSpec]]:
    """`(begin, end, spec)` of each tensor in the header, relative to the start of the data."""
    for name, entry in header.items():
        try:
            tag, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
                raise ValueError("sizes must be non-negative integers")
            if math.prod(size or 1 for size in shape) >= 2**63:  # even where a size is 0: nothing could hold it
                raise ValueError("the shape is too large")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: the header of tensor {name!r} is malformed ({error}); download it again"
            ) from error
        if not isinstance(tag, str) or tag not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has the dtype {_shortened(repr(tag))}, which is not supported (known: {', '.join(DTYPES)}); "
                "convert the checkpoint to one of these"
            )
        spec = TensorSpec(name, shape, DTYPES[tag], path.name)
        if spec.nbytes != end - begin:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {_shortened(str(shape))} and dtype {tag} needs {spec.nbytes} bytes, its header "
                f"gives it {end - begin}; download it again"
            )
        yield begin, end, spec

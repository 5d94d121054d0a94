"""`pytorch_model.bin`: read only as plain tensors, never as a pickle that may run code."""

from __future__ import annotations

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from bmm_engine.checkpoint.guard import unreadable
from bmm_engine.checkpoint.layout import check_weight_file, file_stamp
from bmm_engine.checkpoint.safetensors_io import byte_view, changed, read_into
from bmm_engine.checkpoint.source import TensorSpec, check_tensors, row_span, shared_storage
from bmm_engine.errors import CheckpointError

_LOCAL_HEADER_BYTES = 30
_REMEDY = "download it again or, where you trust it, load it with transformers and save it as safetensors"


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its file: the byte of its first element, and the strides in elements."""

    offset: int
    stride: tuple[int, ...]


class TorchBinFile:
    """One torch.save file. torch is asked where its tensors lie, in a mapping of which no page is read; what is read is read from the file, since a
    mapped file that is cut meanwhile would end the process.

    Raises CheckpointError for a file that torch refuses under `weights_only=True` or that holds more than tensors.
    """

    def __init__(self, path: Path):
        check_weight_file(path)
        self.path = path
        self.stamp = file_stamp(path)
        records = _records(path)
        tensors = _mapped(path)
        self.aliases = shared_storage(tensors)
        self.specs = {
            name: TensorSpec(name, tuple(tensor.shape), tensor.dtype, path.name) for name, tensor in tensors.items()
        }
        mappings = _mappings(self.stamp[0])
        self._places = {name: _place(path, name, tensor, mappings, records) for name, tensor in tensors.items()}
        if file_stamp(path) != self.stamp:
            raise changed(path)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor, or a range of its rows, in fresh memory. Raises CheckpointError when the file changed."""
        spec, place = self.specs[name], self._places[name]
        shape, offset, size = spec.shape, place.offset, spec.dtype.itemsize
        if rows is not None:
            start, stop = row_span(name, shape, rows)
            shape, offset = (max(stop - start, 0), *shape[1:]), offset + start * place.stride[0] * size
        flat = torch.empty(_span(shape, place.stride), dtype=spec.dtype)
        read_into(byte_view(flat), self.path, offset, self.stamp, name)
        return flat.as_strided(shape, place.stride).contiguous()


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile pickle may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read as plain tensors ({reason}); {_REMEDY}") from error
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path}: holds a {type(state_dict).__name__}, not a state dict; save it as safetensors")
    return check_tensors(state_dict, str(path))


def _records(path: Path) -> dict[int, int]:
    """Offset -> bytes of every record of the zip archive that torch.save writes; none for another file. Raises CheckpointError for one whose records
    are not the tensors' bytes as they are: compressed, or of a machine of another byte order."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            found = {}
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path}: its record {entry.filename!r} is compressed; {_REMEDY}")
                if entry.filename.endswith("/byteorder") and archive.read(entry) != sys.byteorder.encode():
                    raise CheckpointError(f"{path}: was written on a machine of another byte order; {_REMEDY}")
                file.seek(entry.header_offset)
                header = file.read(_LOCAL_HEADER_BYTES)
                name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
                found[entry.header_offset + _LOCAL_HEADER_BYTES + name + extra] = entry.file_size
            return found
    except CheckpointError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # torch says what it is
        return {}


def _mappings(size: int) -> list[tuple[int, int, int]]:
    """Begin, end and offset in its file of what this process has mapped, as large as a whole file of that size."""
    found = []
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        span, _, offset, *_ = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if end - begin >= size:
            found.append((begin, end, int(offset, 16)))
    return found


def _place(
    path: Path, name: str, tensor: torch.Tensor, mappings: list[tuple[int, int, int]], records: dict[int, int]
) -> _Place:
    """Raises CheckpointError for a tensor that is not within one record of the file."""
    if tensor.numel() == 0:
        return _Place(0, tensor.stride())
    storage = tensor.untyped_storage()
    for begin, end, offset in mappings:
        if begin <= storage.data_ptr() < end:
            first = offset + storage.data_ptr() - begin
            inside = (tensor.storage_offset() + _span(tuple(tensor.shape), tensor.stride())) * tensor.element_size()
            if inside <= records.get(first, -1) and not (tensor.is_conj() or tensor.is_neg()):
                return _Place(first + int(tensor.storage_offset()) * tensor.element_size(), tensor.stride())
    raise CheckpointError(f"{path}: tensor {name!r} lies in no record of the file; {_REMEDY}")

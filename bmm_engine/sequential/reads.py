"""What the experts read at every input of the network, kept: it does not depend on how the modules are solved, so that further walks need not
run the experts."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bmm_engine.errors import OutputWriteError
from bmm_engine.sequential.reading import Read


@dataclass
class _Kept:
    """The tensors of one expert at one input, in the order in which they came, one file; `batches`: by batch and call, which they are."""

    path: Path
    batches: list[list[list[int]]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    size: int = 0
    data: mmap.mmap | None = None


class ExpertReads:
    """Files in `folder`, one for each expert and input; `complete` once a walk has been through the whole network."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.complete = False
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._files = 0

    def put(self, name: str, t: int, batch: int, reads: list[Read]) -> None:
        """What expert `t` reads of a batch, call by call, where the module `name` reads first; from batch 0 on in the place of what was put before.
        Raises `OutputWriteError`."""
        key = (name, t)
        if batch == 0:
            self._kept[key] = _Kept(self.folder / f"{self._files}.bin")
            self._files += 1
        kept = self._kept[key]
        try:
            with kept.path.open("wb" if batch == 0 else "ab") as file:
                kept.batches.append([[self._write(file, kept, x) for x in _tensors(read)] for read in reads])
        except OSError as error:
            raise OutputWriteError(
                f"{kept.path}: what the experts read could not be kept ({error}). Free some space there, or set TMPDIR to another place."
            ) from error

    def get(self, name: str, t: int, batch: int, device: torch.device) -> list[Read]:
        """The same again; to be read only."""
        kept = self._kept[name, t]
        if kept.data is None and kept.size:  # a router may give an expert nothing at all
            with kept.path.open("rb") as file:
                kept.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return [Read(*(self._tensor(kept, index).to(device) for index in call)) for call in kept.batches[batch]]

    def _write(self, file: BinaryIO, kept: _Kept, tensor: Tensor) -> int:
        whole = tensor.to("cpu").contiguous()
        file.write(whole.reshape(-1).view(torch.uint8).numpy().data)
        kept.shapes.append(tuple(tensor.shape))
        kept.dtypes.append(tensor.dtype)
        kept.offsets.append(kept.size)
        kept.size += whole.nbytes
        return len(kept.offsets) - 1

    def _tensor(self, kept: _Kept, index: int) -> Tensor:
        count = torch.Size(kept.shapes[index]).numel()
        if not count:
            return torch.empty(kept.shapes[index], dtype=kept.dtypes[index])
        assert kept.data is not None
        flat = torch.frombuffer(kept.data, dtype=kept.dtypes[index], count=count, offset=kept.offsets[index])
        return flat.reshape(kept.shapes[index])


def _tensors(read: Read) -> list[Tensor]:
    return [read.x] if read.stream is None else [read.x, read.stream]

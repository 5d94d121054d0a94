"""What the experts read at every input of the network, kept: it does not depend on how the modules are solved, so that further walks need not
run the experts."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bmm_engine.errors import OutputWriteError


@dataclass
class _Kept:
    """The tensors of one expert at one input, in the order in which they came, one file."""

    path: Path
    dtype: torch.dtype
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    size: int = 0
    data: mmap.mmap | None = None


class ExpertReads:
    """Files in `folder`, one for each expert and input; `complete` once a walk has been through the whole network."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.complete = False
        self._kept: dict[tuple[str, int], _Kept] = {}

    def put(self, name: str, t: int, batch: int, tensors: list[Tensor]) -> None:
        """What expert `t` reads of a batch where the module `name` reads first. Raises `OutputWriteError`."""
        key = (name, t)
        if batch == 0:
            self._kept[key] = _Kept(self.folder / f"{len(self._kept)}.bin", tensors[0].dtype)
        kept = self._kept[key]
        try:
            with kept.path.open("wb" if batch == 0 else "ab") as file:
                for tensor in tensors:
                    whole = tensor.to("cpu").contiguous()
                    file.write(whole.reshape(-1).view(torch.uint8).numpy().data)
                    kept.shapes.append(tuple(tensor.shape))
                    kept.offsets.append(kept.size)
                    kept.size += whole.nbytes
        except OSError as error:
            raise OutputWriteError(
                f"{kept.path}: what the experts read could not be kept ({error}). Free some space there, or set TMPDIR to another place."
            ) from error

    def get(self, name: str, t: int, batch: int, calls: int, device: torch.device) -> list[Tensor]:
        """The same again; to be read only."""
        kept = self._kept[name, t]
        if kept.data is None:
            with kept.path.open("rb") as file:
                kept.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        found = []
        for index in range(batch * calls, (batch + 1) * calls):
            count = torch.Size(kept.shapes[index]).numel()
            flat = torch.frombuffer(kept.data, dtype=kept.dtype, count=count, offset=kept.offsets[index])
            found.append(flat.reshape(kept.shapes[index]).to(device))
        return found

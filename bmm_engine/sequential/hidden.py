"""Hidden states on their way: one tensor for each batch, in memory as far as there is room, else in a file."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmm_engine.checkpoint.safetensors_io import byte_view
from bmm_engine.errors import CheckpointError, OutputWriteError


class Room:
    """Bytes of memory that several walks share."""

    def __init__(self, limit: int):
        self.left = limit

    def take(self, size: int) -> bool:
        if size > self.left:
            return False
        self.left -= size
        return True

    def give(self, size: int) -> None:
        self.left += size


@dataclass
class _Entry:
    """One batch's tensor: where it lies in the file, its checksum there, and the tensor itself while it is held in memory."""

    offset: int
    shape: tuple[int, ...]
    checksum: int = 0
    held: Tensor | None = None


class HiddenFile:
    """Tensors of one dtype appended to a file, read back one by one."""

    def __init__(self, path: Path, dtype: torch.dtype, entries: Iterable[_Entry] = ()):
        self.path, self.dtype = path, dtype
        self.entries = list(entries)
        self._size = 0
        self._file: Any = None

    def append(self, tensor: Tensor, *, hold: bool, write: bool) -> None:
        """Raises `OutputWriteError`."""
        tensor = tensor.to("cpu", self.dtype).contiguous()
        entry = _Entry(self._size, tuple(tensor.shape), held=tensor if hold else None)
        self.entries.append(entry)
        if not write:
            return
        self._size += tensor.nbytes
        data = byte_view(tensor)
        # A checksum in the place of a sync to disk, which would take longer than the writing: what a crash of the machine leaves is found out.
        entry.checksum = zlib.crc32(data)
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("wb")
            self._file.write(data)
        except OSError as error:
            raise OutputWriteError(
                f"{self.path}: hidden states could not be written ({error}). Free some space, or keep them in memory (sequential.hidden_memory)."
            ) from error

    def read(self, index: int) -> Tensor:
        """Raises `CheckpointError` for a file that was cut off."""
        entry = self.entries[index]
        if entry.held is not None:
            return entry.held
        if self._file is not None:
            self._file.flush()
        data = bytearray(int(torch.Size(entry.shape).numel()) * self.dtype.itemsize)
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            if file.readinto(data) != len(data) or zlib.crc32(data) != entry.checksum:
                folder = self.path.parents[2]  # FOLDER/sweep-1/stage-003/expert-0.bin
                raise CheckpointError(
                    f"{self.path}: does not hold what was written there, perhaps for a crash of the machine. Remove the folder {folder} and merge"
                    " again."
                )
        return torch.frombuffer(data, dtype=self.dtype).reshape(entry.shape)

    def close(self) -> None:
        """Nothing more will be appended. Raises `OutputWriteError`."""
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            raise OutputWriteError(
                f"{self.path}: hidden states could not be written ({error}). Free some space."
            ) from error
        self._file = None

    def layout(self) -> list[Any]:
        return [[entry.offset, list(entry.shape), entry.checksum] for entry in self.entries]


class HiddenStates(MutableSequence[Tensor]):
    """The hidden states before one stage and, while it is at work, those after it: `states[i] = tensor` is for the next stage and gives up
    what `states[i]` holds in memory; `turn` goes on to the next.

    `dtype`: how they are kept; `run_dtype`: how they are given back, as the models run. `folder(stage)`: where the states before a stage are
    written. `keep`: all are written, so that a killed walk can go on; else only those that find no room.
    """

    def __init__(self, name: str, room: Room, dtype: torch.dtype, *, run_dtype: torch.dtype, keep: bool):
        self.name, self.room, self.dtype, self.run_dtype, self.keep = name, room, dtype, run_dtype, keep
        self._now: HiddenFile | None = None
        self._next: HiddenFile | None = None
        self._folder: Path | None = None

    def into(self, folder: Path) -> None:
        """Write what comes next into `folder`."""
        self._folder = folder

    def __len__(self) -> int:
        return len(self._now.entries) if self._now is not None else 0

    def __getitem__(self, index: Any) -> Any:
        assert self._now is not None
        return self._now.read(index).to(self.run_dtype)

    def __setitem__(self, index: Any, tensor: Any) -> None:
        if self._next is None:
            self._next = self._new()
        assert self._now is not None
        assert index == len(self._next.entries), "batches must come in order"
        self._append(self._next, tensor)
        self._drop(self._now, index)

    def insert(self, index: int, value: Tensor) -> None:
        """The hidden states before the first block."""
        if self._now is None:
            self._now = self._new()
        self._append(self._now, value)

    def __delitem__(self, index: Any) -> None:
        raise TypeError("hidden states are dropped by `turn`")

    def turn(self) -> None:
        """The next hidden states become the current ones; of those, what is in memory is given up."""
        if self._next is not None:
            for index in range(len(self)):
                self._drop(self._now, index)
            self._now, self._next = self._next, None
        if self._now is not None:
            self._now.close()

    def layout(self) -> list[Any]:
        """Where in their file the current states lie, for `resume`."""
        assert self._now is not None
        return self._now.layout()

    def resume(self, folder: Path, layout: Iterable[Any]) -> None:
        """Go on with what an earlier walk wrote."""
        self._now = HiddenFile(
            folder / f"{self.name}.bin",
            self.dtype,
            [_Entry(offset, tuple(shape), checksum) for offset, shape, checksum in layout],
        )

    def moved(self, folder: Path) -> None:
        """The folder that holds the current states was renamed."""
        if self._now is not None:
            self._now.path = folder / self._now.path.name

    def _new(self) -> HiddenFile:
        assert self._folder is not None
        return HiddenFile(self._folder / f"{self.name}.bin", self.dtype)

    def _append(self, file: HiddenFile, tensor: Tensor) -> None:
        hold = self.room.take(tensor.numel() * self.dtype.itemsize)
        file.append(tensor, hold=hold, write=self.keep or not hold)

    def _drop(self, file: HiddenFile | None, index: int) -> None:
        assert file is not None
        entry = file.entries[index]
        if entry.held is not None:
            self.room.give(entry.held.nbytes)
            entry.held = None

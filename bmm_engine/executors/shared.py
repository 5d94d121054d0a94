"""Large tensors for all worker processes of this machine: one file that each maps into its memory, so that its pages are there once."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bmm_engine.disk.files import matches, remove_own
from bmm_engine.errors import OutputWriteError

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = ".shared-"
_is_ours = matches(r"lock|\d+\.safetensors")


@dataclass(frozen=True)
class MappedTensors:
    """Tensors in a safetensors file. Each reader's own writes stay its own: pages are copied on write."""

    path: str

    def tensors(self) -> dict[str, Tensor]:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)


class SharedFolder:
    """A private folder inside `parent` (by default the system's for temporary files), made when first needed.

    Whoever made it holds a lock in it, which the kernel releases when that process ends, however it ends: the next one removes what was left.
    """

    def __init__(self, parent: Path | None):
        self.parent = Path(tempfile.gettempdir()) if parent is None else Path(parent)
        self.path: Path | None = None
        self._lock = -1
        self._files = 0

    def write(self, tensors: Mapping[str, Tensor]) -> MappedTensors:
        """Raises `OutputWriteError` where the file cannot be written."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        try:
            if self.path is None:
                self._make()
            path = f"{self.path}/{self._files}.safetensors"
            self._files += 1
            save_file(_separate(tensors), path)
        except (OSError, SafetensorError) as error:
            raise OutputWriteError(
                f"{self.parent}: {len(tensors)} tensors ({size:,} bytes) cannot be written for the workers to share: {error}; make room there, or"
                " use no worker processes."
            ) from error
        return MappedTensors(path)

    def remove(self) -> None:
        """Readers that have mapped a file keep it."""
        if self.path is not None:
            _remove(self.path)
            os.close(self._lock)
            self.path = None

    def _make(self) -> None:
        self.parent.mkdir(parents=True, exist_ok=True)
        for left in self.parent.glob(f"{_PREFIX}*"):
            _remove_if_abandoned(left)
        made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.parent))
        self._lock = os.open(made / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = made


def _remove_if_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder / "lock", os.O_RDWR)
    except OSError:  # being made this moment, or another user's
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder)
    except OSError:
        pass  # in use
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """What is ours in it, the lock last; and the folder, unless something else lies there."""
    with suppress(OSError):
        remove_own(folder, _is_ours, ("lock",))


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two in one memory: the format's conditions."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        found[name] = own.clone() if memory in seen else own
        seen.add(memory)
    return found

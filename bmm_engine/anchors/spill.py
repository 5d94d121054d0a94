"""Tensors that a reduction found and the rule needs again, kept in a temporary file instead of in memory."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref

import torch
from torch import Tensor

from bmm_engine.errors import OutputWriteError


class Spill:
    """Tensors by name in a file without a name (in TMPDIR), which is gone with this object or its process. Threads may share it."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self._end = 0
        self._lock = threading.Lock()
        self._descriptor, path = tempfile.mkstemp(prefix="bmm-")
        os.unlink(path)
        weakref.finalize(self, os.close, self._descriptor)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def put(self, name: str, tensor: Tensor) -> None:
        """Store a tensor under a new name. Raises `OutputWriteError` when the disk does not take it."""
        stored = tensor.detach().to("cpu").contiguous()
        with self._lock:
            offset = self._end
            self._end += stored.nbytes
        view = stored.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        try:
            while done < len(view):  # the system writes at most 2 GiB at once
                done += os.pwrite(self._descriptor, view[done:], offset + done)
        except OSError as error:
            raise OutputWriteError(
                f"{tempfile.gettempdir()}: intermediate results of tensor {name!r} ({len(view)} bytes) cannot be written ({error.strerror});"
                " free some space there, or set TMPDIR to a place that has more"
            ) from error
        self._places[name] = offset, stored.dtype, tuple(stored.shape)

    def get(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        offset, dtype, shape = self._places[name]
        tensor = torch.empty(shape, dtype=dtype)
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            done += os.preadv(self._descriptor, [view[done:]], offset + done)
        return tensor.to(device)

"""Messages between processes: pickles, with the data of tensors and arrays beside them, written and read without another copy."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """An encoded value: a pickle and the buffers it refers to. It holds references to the data, which must not change until it is sent."""

    pickled: bytes
    buffers: Sequence[pickle.PickleBuffer]


def encode(value: Any) -> Message:
    """Raises what pickle raises for a value that cannot be sent."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    return Message(file.getvalue(), buffers)


def send(connection: Connection, message: Message) -> None:
    """Raises `OSError` where the other end is gone."""
    views = [buffer.raw() for buffer in message.buffers]
    connection.send_bytes(pickle.dumps((message.pickled, [len(view) for view in views])))
    for view in views:
        while len(view):
            view = view[os.write(connection.fileno(), view) :]


@dataclass(frozen=True)
class Received:
    """A message as it came, complete but not yet unpickled."""

    pickled: bytes
    buffers: list[Any]

    def decode(self) -> Any:
        return pickle.loads(self.pickled, buffers=self.buffers)


def receive(connection: Connection) -> Received:
    """Raises `EOFError` or `OSError` where the other end is gone, in the middle of a message too."""
    pickled, sizes = pickle.loads(connection.recv_bytes())
    buffers = []
    for size in sizes:
        # torch aligns memory as it does everywhere else, so that no kernel sees a difference.
        buffer = torch.empty(size, dtype=torch.uint8).numpy()
        view = buffer.data
        while len(view):
            count = os.readv(connection.fileno(), [view])
            if count == 0:
                raise EOFError
            view = view[count:]
        buffers.append(buffer)
    return Received(pickled, buffers)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or not _is_plain(value):
            return NotImplemented
        return tensor_of, (pickle.PickleBuffer(bytes_of(value).data), value.dtype, tuple(value.shape))


def _is_plain(tensor: Tensor) -> bool:
    """Is the tensor no more than numbers in memory?"""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.requires_grad
    return plain and not (tensor.is_quantized or tensor.is_complex() or tensor.is_neg())


def bytes_of(tensor: Tensor) -> Any:
    """A CPU tensor's data as a flat uint8 array, for any dtype, also those that numpy does not know; no copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def tensor_of(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor whose `bytes_of` is `data`, in its memory."""
    if data.size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).reshape(shape)

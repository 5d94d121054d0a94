"""Where tensors come from: the protocol that every stage reads through, and the source for tensors in memory."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from bmm_engine.errors import CheckpointError, ConfigError, MissingTensorError


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one stored tensor; `file` is the base name of its weight file, or "memory"."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors that are loaded one at a time, or a range of rows at a time."""

    label: str
    """For error messages: the path, the hub id, or "state dict 'expert 2'"."""

    def names(self) -> tuple[str, ...]:
        """Names that hold data, without aliases: in file order, then in offset order within a file."""
        ...

    def __contains__(self, name: object) -> bool:
        """True for a name that holds data and for an alias of one."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of `name` (an alias keeps its own name). Raises MissingTensorError."""
        ...

    def load(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A fresh contiguous CPU tensor that the caller owns; `rows` selects a range of dimension 0, as in
        `tensor[rows]`.

        Raises MissingTensorError, ConfigError for rows that are no contiguous range, CheckpointError when the data
        cannot be read.
        """
        ...

    @property
    def config(self) -> dict[str, Any] | None:
        """The parsed config.json, or None."""
        ...

    @property
    def aliases(self) -> dict[str, str]:
        """Tied name -> the name that holds its data."""
        ...


def row_span(name: str, shape: tuple[int, ...], rows: slice | None) -> tuple[int, int]:
    """The `(start, stop)` that `rows` selects on dimension 0, with Python's clamping.

    Raises ConfigError for a scalar or a step other than 1: such rows are not one contiguous range of bytes.
    """
    if not shape:
        raise ConfigError(f"tensor {name!r} is a scalar and has no rows; load or write it whole (rows=None)")
    if rows is None:
        return 0, shape[0]
    start, stop, step = rows.indices(shape[0])
    if step != 1:
        raise ConfigError(
            f"tensor {name!r}: rows={rows} has step {step}; only contiguous ranges (step 1) are supported"
        )
    return start, max(start, stop)


def missing_tensor(name: str, label: str, names: Iterable[str]) -> MissingTensorError:
    """The error for an unknown tensor name, with the nearest names that do exist."""
    close = difflib.get_close_matches(name, list(names), n=3)
    hint = f"; the nearest names are {', '.join(map(repr, close))}" if close else ""
    return MissingTensorError(f"{label}: holds no tensor {name!r}{hint}. Check that the models share one architecture")


def shared_storage(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Later name -> first name of every tensor that is another one: same memory, shape, stride and dtype."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        holder = first.setdefault(identity, name)
        if holder != name:
            aliases[name] = holder
    return aliases


def check_tensors(state_dict: Mapping[Any, Any], label: str) -> dict[str, torch.Tensor]:
    """The entries, detached. Raises CheckpointError for a key that is no string or a value without dense data."""
    tensors = {}
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{label}: entry {name!r} is a {type(value).__name__}, not a tensor; pass the flat state dict of the "
                "model"
            )
        if value.is_meta or value.layout != torch.strided or value.is_quantized:
            kind = "on the meta device" if value.is_meta else f"quantized or stored as {value.layout}"
            raise CheckpointError(f"{label}: tensor {name!r} is {kind}; materialise it as a dense tensor first")
        tensors[name] = value.detach()
    return tensors


def own_copy(tensor: torch.Tensor, name: str, rows: slice | None) -> torch.Tensor:
    """A contiguous CPU copy of `tensor`, or of its `rows`, that shares no memory with it."""
    if rows is not None:
        start, stop = row_span(name, tuple(tensor.shape), rows)
        tensor = tensor[start:stop]
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


class StateDictSource(TensorSource):
    """Tensors of a state dict, held by reference. Entries that share memory, shape and stride are aliases of the first
    one.

    Raises CheckpointError for entries that are not dense tensors.
    """

    def __init__(
        self, state_dict: Mapping[str, torch.Tensor], label: str = "state dict", config: dict[str, Any] | None = None
    ):
        self.label = label
        self._config = config
        self._tensors = check_tensors(state_dict, label)

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._tensors if name not in self.aliases)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def spec(self, name: str) -> TensorSpec:
        tensor = self._tensor(name)
        return TensorSpec(name, tuple(tensor.shape), tensor.dtype, "memory")

    def load(self, name: str, rows: slice | None = None) -> torch.Tensor:
        return own_copy(self._tensor(name), name, rows)

    @property
    def config(self) -> dict[str, Any] | None:
        return self._config

    @cached_property
    def aliases(self) -> dict[str, str]:
        return shared_storage(self._tensors)

    def _tensor(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise missing_tensor(name, self.label, self._tensors) from None

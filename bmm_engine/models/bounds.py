"""How large a network may be that a config describes: not far beyond what the files hold, or it is built for hours, or in all memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bmm_engine.errors import CheckpointError

# Beyond these nothing is asked of the files: heads, embeddings and layers that a file leaves out are still built.
_FREE_COUNT, _FREE_SIZE, _FREE_TOTAL = 10_000, 2**24, 2**28
_PACKED = 8  # a packed four-bit weight has an eighth of the elements
# Keys of which a config makes a list or a mapping, before anything is built: types of layers, names of labels.
_COUNTS = re.compile(r"layer|depth|block|label|class|stage|expert")


@dataclass(frozen=True)
class Held:
    """What the files of a checkpoint hold: tensors, elements in all, the largest dimension."""

    tensors: int
    elements: int
    largest: int

    @classmethod
    def of(cls, stored: Mapping[str, tuple[int, ...]]) -> Held:
        """Of name -> shape."""
        sizes = [math.prod(shape) for shape in stored.values()]
        return cls(len(sizes), sum(sizes), max((d for shape in stored.values() for d in shape), default=0))

    def check_counts(self, config: Mapping[str, Any], where: str) -> None:
        """Raise `CheckpointError` for a number of layers, labels or the like that no such file has."""
        most = max(_FREE_COUNT, self.tensors, self.largest)
        for key, value in _numbers(config):
            if value > most and _COUNTS.search(key):
                raise CheckpointError(
                    f"{where}: {key} is {_shown(value)}, while the files hold {self.tensors} tensors, the largest dimension {self.largest}."
                    " Correct the config, or download it again."
                )

    @contextmanager
    def limiting(self, where: str) -> Iterator[None]:
        """Modules made meanwhile raise `CheckpointError` once they are more, or larger, than the files can account for."""
        from torch import nn

        most, largest = max(_FREE_COUNT, 4 * self.tensors), max(_FREE_SIZE, _PACKED * self.elements)
        total = max(_FREE_TOTAL, 4 * _PACKED * self.elements)
        seen: set[int] = set()
        spent = [0, 0]
        kept: list[Any] = []  # an id may be given again once its owner is gone

        def count(tensor: Any, name: str) -> None:
            if tensor is None or id(tensor) in seen:
                return
            seen.add(id(tensor))
            kept.append(tensor)
            spent[0] += 1
            spent[1] += tensor.numel()
            if spent[0] > most or tensor.numel() > largest or spent[1] > total:
                raise CheckpointError(
                    f"{where}: describes a network of more than {spent[0] - 1} tensors and {spent[1]} elements (the last one {name!r} of shape"
                    f" {tuple(tensor.shape)}), while the files hold {self.tensors} tensors of {self.elements} elements in all. Correct the config,"
                    " or download it again."
                )

        register = nn.Module.register_parameter

        def register_counted(module: nn.Module, name: str, parameter: Any) -> None:
            count(parameter, name)
            register(module, name, parameter)

        nn.Module.register_parameter = register_counted  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    if isinstance(value, Mapping):
        for name, own in value.items():
            yield from _numbers(own, str(name))
    elif isinstance(value, (list, tuple)):
        for own in value:
            yield from _numbers(own, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def _shown(value: float) -> str:
    return (
        str(value)
        if abs(value) < 10**15
        else f"about {value:.0e}"
        if abs(value) < 1e300
        else "a number of hundreds of digits"
    )

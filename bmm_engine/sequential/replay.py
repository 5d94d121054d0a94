"""Parts of a block that are finished give again what they gave before, so that a pass to the next input computes only what is new."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bmm_engine.models.blocks import forwarding
from bmm_engine.sequential.hidden import Room


@dataclass
class _Kept:
    """What the finished parts gave for one batch, in the order in which they were called; and its size in memory."""

    outputs: dict[str, list[Any]] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)


class Replay:
    """Of one model's passes through one block: `finished` parts are recorded in one pass and replayed in the next.

    A part is a submodule of the block; what it gives must not change any more. Outputs are kept while there is `room`; others are computed anew,
    to the same bits.
    """

    def __init__(self, block: nn.Module, room: Room, batches: int):
        self.block, self.room = block, room
        self._kept = [_Kept() for _ in range(batches)]

    @contextmanager
    def passing(self, batch: int, finished: Sequence[str]) -> Iterator[None]:
        """One pass of the batch, which stops or goes on; `finished`: parts (names in the block), none within another."""
        kept = self._kept[batch]
        fresh: dict[str, list[Any]] = {name: [] for name in finished if name not in kept.outputs}
        with ExitStack() as stack:
            for name in _outermost(kept.outputs):
                stack.enter_context(forwarding(self.block.get_submodule(name), _replaying(kept.outputs[name])))
            for name, outputs in fresh.items():
                handle = self.block.get_submodule(name).register_forward_hook(_recording(outputs))
                stack.callback(handle.remove)
            try:
                yield
            finally:  # also where the pass stops
                for name, outputs in fresh.items():
                    if outputs:
                        self._keep(kept, name, outputs)

    def clear(self) -> None:
        for kept in self._kept:
            for name in list(kept.outputs):
                self._drop(kept, name)

    def _keep(self, kept: _Kept, name: str, outputs: list[Any]) -> None:
        size = sum(_size(output) for output in outputs)
        if self.room.take(size):
            for inner in [n for n in kept.outputs if n.startswith(f"{name}.")]:
                self._drop(kept, inner)
            kept.outputs[name] = outputs
            kept.size[name] = size

    def _drop(self, kept: _Kept, name: str) -> None:
        del kept.outputs[name]
        self.room.give(kept.size.pop(name))


def finished_parts(block: nn.Module, solved: Collection[str], unsolved: Collection[str]) -> list[str]:
    """The outermost submodules of a block with solved modules in them and no unsolved ones; all by their names in the block."""

    def holds(name: str, modules: Collection[str]) -> bool:
        return any(module == name or module.startswith(f"{name}.") for module in modules)

    found = [n for n, _ in block.named_modules() if n and holds(n, solved) and not holds(n, unsolved)]
    return sorted(_outermost(found))


def _outermost(names: Collection[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _recording(into: list[Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        into.append(_copy(output))  # what follows may change it in place

    return hook


def _replaying(outputs: list[Any]) -> Callable[..., Any]:
    calls = iter(outputs)
    return lambda *args, **kwargs: _copy(next(calls))


def _copy(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, dict):
        copied: Any = copy.copy(output)
        for key, value in output.items():
            copied[key] = _copy(value)
        return copied
    if isinstance(output, (tuple, list)):
        parts = [_copy(value) for value in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output


def _size(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.nbytes
    if isinstance(output, dict):
        return sum(_size(value) for value in output.values())
    if isinstance(output, (tuple, list)):
        return sum(_size(value) for value in output)
    return 0

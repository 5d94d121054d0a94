"""What modules read while a stage of the network runs, and which of them read the same."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.blocks import Stop
from bmm_engine.errors import CollectionError

Run = Callable[[int], Any]


@dataclass(frozen=True)
class SharedInput:
    """Modules (live names) that read the same tensors: the first of them reads `calls` in one pass of its stage."""

    modules: tuple[str, ...]
    calls: int

    @property
    def leader(self) -> str:
        return self.modules[0]


def shared_inputs(modules: Mapping[str, nn.Module], alone: Container[str], run: Run) -> list[SharedInput]:
    """Which of a stage's modules read the same, in the order in which they first read; `run(0)` runs it. Those never called are left out.

    Modules in `alone` share with none.
    """
    read: dict[str, list[Tensor]] = {}
    sums: dict[str, list[float]] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input_of(name, args, kwargs)
            read.setdefault(name, []).append(x)
            # An input that is changed in place between two readers is not the same.
            sums.setdefault(name, []).append(float(x.sum(dtype=torch.float64)))

        return hook

    with _hooked(modules, listen):
        run(0)
    groups: dict[Any, list[str]] = {}
    for name, inputs in read.items():
        key: Any = tuple((id(x), total) for x, total in zip(inputs, sums[name], strict=True))
        key = name if name in alone else key
        groups.setdefault(key, []).append(name)
    return [SharedInput(tuple(names), len(read[names[0]])) for names in groups.values()]


class Reader:
    """Catches what one module reads in each pass of its stage."""

    def __init__(self, shared: SharedInput, module: nn.Module):
        self.shared, self.module = shared, module
        self._caught: list[Tensor] = []
        self._stop = False

    @contextmanager
    def listening(self) -> Iterator[Reader]:
        handle = self.module.register_forward_pre_hook(self._hook, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()

    def read(self, run: Run, batch: int) -> list[Tensor]:
        """What the module reads of a batch; the pass ends there."""
        self._stop = True
        try:
            run(batch)
        except Stop:
            return self._taken(batch)
        return self._taken(batch)  # raises

    def read_through(self, run: Run, batch: int) -> tuple[list[Tensor], Any]:
        """The same, of a pass that goes on to the stage's end; and what the stage gives."""
        self._stop = False
        output = run(batch)
        return self._taken(batch), output

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _input_of(self.shared.leader, args, kwargs)
        # A pass that goes on may change it in place.
        self._caught.append(x if self._stop else x.clone())
        if self._stop and len(self._caught) == self.shared.calls:
            raise Stop

    def _taken(self, batch: int) -> list[Tensor]:
        taken, self._caught = self._caught, []
        if len(taken) != self.shared.calls:
            raise CollectionError(
                f"{self.shared.leader}: read {self.shared.calls} inputs of the first calibration batch, and {len(taken)} of batch {batch}. What is"
                " called only sometimes cannot be solved block by block; leave it out with `modules`."
            )
        return taken


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], listen: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(listen(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    found = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(found, Tensor):
        raise CollectionError(f"{name}: is called without a tensor as its first argument; leave it out with `modules`.")
    return found

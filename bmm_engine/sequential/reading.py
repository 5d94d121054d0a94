"""What modules read while a stage of the network runs, which of them read the same, and what the residual stream holds where they write to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.errors import CollectionError
from bmm_engine.models.blocks import forwarding
from bmm_engine.models.calling import Stop
from bmm_engine.sequential.additions import Additions

Run = Callable[[int], Any]


@dataclass(frozen=True)
class SharedInput:
    """Modules (live names) that read the same tensors: the first of them reads `calls` in one pass of its stage, of `rows` rows in all.

    `additions`: of a module that reads them alone and whose output is added, before anything else is done with it and before another of the
    stage's modules is called, to what is there: how many additions in a row, in each call. 0 for one that does not write to the residual stream.
    """

    modules: tuple[str, ...]
    calls: int
    additions: int = 0
    rows: int = 0

    @property
    def leader(self) -> str:
        return self.modules[0]


def shared_inputs(modules: Mapping[str, nn.Module], alone: Container[str], run: Run) -> list[SharedInput]:
    """Which of a stage's modules read the same, in the order in which they first read; `run(0)` runs it. Those never called are left out.

    Modules in `alone` share with none.
    """
    read: dict[str, list[Tensor]] = {}
    sums: dict[str, list[float]] = {}
    added: dict[str, list[int]] = {}
    now = [""]

    def count(addend: Tensor) -> None:
        added[now[0]][-1] += 1

    additions = Additions(count)

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            additions.leave()
            x = _input_of(name, args, kwargs)
            read.setdefault(name, []).append(x)
            # An input that is changed in place between two readers is not the same.
            sums.setdefault(name, []).append(float(x.sum(dtype=torch.float64)))

        return hook

    def follow(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            now[0] = name
            added.setdefault(name, []).append(0)
            additions.follow(output)

        return hook

    with _hooked(modules, listen, follow), additions:
        run(0)
    groups: dict[Any, list[str]] = {}
    for name, inputs in read.items():
        key: Any = (_block_of(name), *((id(x), total) for x, total in zip(inputs, sums[name], strict=True)))
        key = name if name in alone else key
        groups.setdefault(key, []).append(name)
    found = []
    for names in groups.values():
        counts = set(added[names[0]])
        writes = len(names) == 1 and names[0] not in alone and len(counts) == 1
        inputs = read[names[0]]
        rows = sum(x.shape[:-1].numel() for x in inputs)
        found.append(SharedInput(tuple(names), len(inputs), counts.pop() if writes else 0, rows))
    return found


def _block_of(name: str) -> str:
    """What stands before the first number of a name, and the number: what all blocks read (of an encoder) is solved in each by itself, whether the
    model is walked block by block or as a whole."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return "" if found is None else found[0]


@dataclass(frozen=True)
class Read:
    """What a module reads in one call (..., in), and where it writes to the residual stream what its output is added to (..., out)."""

    x: Tensor
    stream: Tensor | None = None


class OtherRowsError(CollectionError):
    """A module is not called as often, or with as many rows, as before: a router chooses what it reads."""


class Reader:
    """Catches what one module reads in each pass of its stage and, with `outputs` (how many features it gives), what that is added to."""

    def __init__(self, shared: SharedInput, module: nn.Module, outputs: int = 0):
        self.shared, self.module = shared, module
        self.outputs = outputs if shared.additions else 0
        self.routed = False  # then what it reads may differ from pass to pass
        self._inputs: list[Tensor] = []
        self._streams: list[Tensor] = []
        self._left = 0  # additions of the call at work
        self._stop = False
        self._additions = Additions(self._caught)

    @contextmanager
    def listening(self) -> Iterator[Reader]:
        with ExitStack() as stack:
            handle = self.module.register_forward_pre_hook(self._on_input, with_kwargs=True)
            stack.callback(handle.remove)
            if self.outputs:
                handle = self.module.register_forward_hook(self._on_output)
                stack.callback(handle.remove)
            yield self

    def read(self, run: Run, batch: int) -> list[Read]:
        """What the module reads of a batch, call by call; the pass ends there."""
        self._stop = True
        with ExitStack() as stack:
            if self.outputs:  # what it gives is of no account
                stack.enter_context(forwarding(self.module, self._nothing))
                stack.enter_context(self._additions)
            stack.enter_context(suppress(Stop))
            run(batch)
        return self._taken(batch)

    def read_through(self, run: Run, batch: int) -> tuple[list[Read], Any]:
        """The same, of a pass that goes on to the stage's end; and what the stage gives."""
        self._stop = False
        with ExitStack() as stack:
            if self.outputs:
                stack.enter_context(self._additions)
            output = run(batch)
        return self._taken(batch), output

    def _nothing(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.outputs)

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _input_of(self.shared.leader, args, kwargs)
        # A pass that goes on may change it in place.
        self._inputs.append(x if self._stop and not self.outputs else x.clone())
        if self._stop and not self.outputs and not self.routed and len(self._inputs) == self.shared.calls:
            raise Stop

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._left = self.shared.additions
        self._additions.follow(output)

    def _caught(self, addend: Tensor) -> None:
        if not self._left:
            return
        if self._left == self.shared.additions:
            self._streams.append(addend)
        else:
            self._streams[-1] += addend.reshape(
                self._streams[-1].shape
            )  # between two additions it may take another view
        self._left -= 1
        if self._stop and not self._left and len(self._streams) == self.shared.calls:
            raise Stop

    def _taken(self, batch: int) -> list[Read]:
        inputs, self._inputs = self._inputs, []
        streams, self._streams = self._streams, []
        self._additions.leave()
        if self.routed:
            return [Read(x) for x in inputs]
        if len(inputs) != self.shared.calls:
            raise OtherRowsError(
                f"{self.shared.leader}: read {self.shared.calls} inputs of the first calibration batch, and {len(inputs)} of batch {batch}"
            )
        if not self.outputs:
            return [Read(x) for x in inputs]
        if len(streams) != self.shared.calls or self._left:
            raise CollectionError(
                f"{self.shared.leader}: what it gives is added to the residual stream in the first calibration batch, and not in batch {batch}."
                " Aim at what modules give (target: module)."
            )
        return [Read(*pair) for pair in zip(inputs, streams, strict=True)]


@contextmanager
def _hooked(
    modules: Mapping[str, nn.Module],
    listen: Callable[[str], Callable[..., None]],
    follow: Callable[[str], Callable[..., None]],
) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(listen(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(follow(name)).remove)
        yield


def _input_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    found = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(found, Tensor):
        raise CollectionError(f"{name}: is called without a tensor as its first argument; leave it out with `modules`.")
    return found

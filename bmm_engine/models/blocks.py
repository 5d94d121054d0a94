"""A model as a sequence of blocks: find them, and carry hidden states through them, one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bmm_engine.errors import CollectionError, ConfigError
from bmm_engine.models.architecture import linear_module
from bmm_engine.models.calling import (
    BodyEnd,
    Mask,
    Stop,
    call_model,
    errors_named,
    padding_of,
    placement,
    to_device,
)

_BY_ITSELF = "As a part of the model it did: say `mode: plain`, which runs the model as a whole."


def find_blocks(model: nn.Module, pattern: str | None = None) -> str:
    """The name of the list of blocks: the longest list of modules of one class with linear modules in them, or the one that `pattern` names.

    Raises `ConfigError` where there is none, or several of that length.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _are_blocks(module)
    }
    if pattern is not None:
        lists = {name: module for name, module in lists.items() if fnmatchcase(name, pattern)}
    longest = max((len(module) for module in lists.values()), default=0)
    found = [name for name, module in lists.items() if len(module) == longest]
    if len(found) != 1:
        which = f"{len(found)} of length {longest}: {', '.join(found)}" if found else "none"
        asked = f" that matches {pattern!r}" if pattern is not None else ""
        raise ConfigError(
            f"blocks: {type(model).__name__} must have one longest list of blocks (modules of one class){asked}, but has {which}. Name the list"
            " with `blocks`, for example 'encoder.layer'."
        )
    return found[0]


def _are_blocks(modules: Iterable[nn.Module]) -> bool:
    items = list(modules)
    holds = [any(linear_module(name, inner) for name, inner in item.named_modules()) for item in items]
    return bool(items) and len({type(item) for item in items}) == 1 and all(holds)


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block, the hidden states left out: `key` says where they go."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: int | str

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], block: str) -> tuple[BlockCall, Tensor]:
        for value in (*args, *kwargs.values()):
            if is_cache(value):
                raise CollectionError(
                    f"{block}: is called with a {type(value).__name__}, which would grow each time the block runs. Switch the cache off"
                    " (use_cache=False in the model's config, and not in the batches)."
                )
        if args and isinstance(args[0], Tensor):
            return cls((None, *args[1:]), kwargs, 0), args[0]
        names = ["hidden_states", *kwargs]
        key = next((name for name in names if isinstance(kwargs.get(name), Tensor)), None)
        if key is None:
            raise CollectionError(
                f"{block}: none of its arguments is a tensor of hidden states; name another list with `blocks`."
            )
        return cls(args, {**kwargs, key: None}, key), kwargs[key]

    def values(self) -> list[Any]:
        """All but the hidden states."""
        return [*self.args, *self.kwargs.values()]

    def __call__(self, block: Runnable, hidden: Tensor) -> Any:
        if isinstance(self.key, int):
            return block(hidden, *self.args[1:], **self.kwargs)
        return block(*self.args, **{**self.kwargs, self.key: hidden})


@dataclass(frozen=True)
class Weighted:
    """A module that runs with `tensors`, by its own names for them, in the place of its parameters and buffers.

    `tied`: whether it may hold a parameter under two names, of which `tensors` has one; to look for those takes a while.
    """

    module: nn.Module
    tensors: Mapping[str, Tensor]
    tied: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, dict(self.tensors), args, kwargs, tie_weights=self.tied)


Runnable = nn.Module | Weighted


def is_cache(value: Any) -> bool:
    """Does it keep keys and values, and grow with each call?"""
    return type(value).__name__.endswith("Cache")


class BlockWalk:
    """Calibration batches on their way through the blocks of a model: hidden states are carried from block to block.

    Made with the model whose embeddings they start from: it reads each batch once, up to its last block, and what it hands to every block
    beside the hidden states (masks, rotary angles) is kept. Where the model has gone through other lists before (an encoder's), `after` are those
    walks, finished, and give what their blocks gave. Then, block by block, any module may stand in for block `index`:

        output = walk.call(batch, index, block)     # on the hidden states carried so far, which stay as they are
        walk.advance(batch, output)                 # these are the next ones
        walk.finish(batch, model)                   # after the last block: what comes after the blocks, in any model of the architecture
    """

    def __init__(
        self,
        model: Runnable,
        blocks: str,
        batches: Iterable[Any],
        mask: Mask,
        *,
        device: torch.device | None = None,
        hidden: MutableSequence[Tensor] | None = None,
        after: Sequence[BlockWalk] = (),
    ):
        """`blocks`: the name of the list, as `find_blocks` gives it. `device`: of the model, by default that of its first parameter. `hidden`:
        where the hidden states are kept, an empty sequence; by default a list. Raises `CollectionError`, `EmptyCalibrationError`."""
        self.device = placement(module_of(model))[0] if device is None else device
        self.blocks = blocks
        self.batches = list(batches)
        self.padding = [padding_of(module_of(model), to_device(batch, self.device), mask) for batch in self.batches]
        self.after = tuple(after)
        self.hidden: MutableSequence[Tensor] = [] if hidden is None else hidden
        self._calls: list[list[BlockCall]] = []
        self._forms: list[Any] = []
        held = len(self.hidden)  # of an earlier walk that goes on here
        with torch.inference_mode():
            form: Any = None
            for number in range(len(self.batches)):
                # Where a block gives nothing beside hidden states, one run of the first tells the form of what all of them give.
                with self.before(model, number):
                    calls, first, form = _record(model, blocks, self.batch(number), form if only_hidden(form) else None)
                self._calls.append(calls)
                self._forms.append(form)
                if not held:
                    self.hidden.append(first)

    def __len__(self) -> int:
        """Batches."""
        return len(self.batches)

    def batch(self, number: int) -> Any:
        """A batch on the walk's device."""
        return to_device(self.batches[number], self.device)

    def call(self, batch: int, index: int, block: Runnable) -> Any:
        """What `block`, in the place of block `index`, gives for the hidden states of batch number `batch`. Raises `CollectionError`."""
        # A block may add to its input in place, and the next one to be asked must find it as it was.
        hidden = self.hidden[batch].to(self.device, copy=True)
        with torch.inference_mode(), errors_named(f"{self.blocks}.{index}", "hidden states", hidden, _BY_ITSELF):
            return self._calls[batch][index](block, hidden)

    def advance(self, batch: int, output: Any) -> None:
        """Carry on with a block's `output`."""
        self.hidden[batch] = hidden_of(output)

    def finish(self, batch: int, model: Runnable) -> Any:
        """Run `model` on the batch with the carried hidden states in the place of what its blocks give; None where only heads come after them."""
        with torch.inference_mode(), self.through(model, batch), suppress(BodyEnd):
            return call_model(model, self.batch(batch))

    @contextmanager
    def standing(self, model: Runnable, batch: int) -> Iterator[None]:
        """Each of the blocks gives the carried hidden states of the batch."""
        output = with_hidden(self._forms[batch], self.hidden[batch].to(self.device, copy=True))
        with replaced(module_of(model), self.blocks, lambda *_: output):
            yield

    @contextmanager
    def through(self, model: Runnable, batch: int) -> Iterator[None]:
        """The blocks of this walk, and of those before it, give what they gave at their end."""
        with self.before(model, batch), self.standing(model, batch):
            yield

    @contextmanager
    def before(self, model: Runnable, batch: int) -> Iterator[None]:
        """The blocks of the walks before this one give what they gave at their end."""
        with ExitStack() as stack:
            for walk in self.after[-1:]:
                stack.enter_context(walk.through(model, batch))
            yield


def module_of(model: Runnable) -> nn.Module:
    return model.module if isinstance(model, Weighted) else model


def before_blocks(model: Runnable, blocks: str, batch: Any) -> None:
    """Run `model` on the batch as far as its first block. Raises `CollectionError` where it calls none."""

    def stop(*_: Any) -> Any:
        raise Stop

    with replaced(module_of(model), blocks, stop):
        try:
            call_model(model, batch)
        except BodyEnd:
            pass
        except Stop:
            return
    raise CollectionError(f"a calibration batch does not reach the first of the model's blocks {blocks}.")


def _record(model: Runnable, blocks: str, batch: Any, form: Any = None) -> tuple[list[BlockCall], Tensor, Any]:
    """How `model` calls each of its blocks, the hidden states that the first one gets, and the form of what a block gives.

    Unless a `form` is given, the first block runs, and its output stands for that of all others: what depends on the form of an output, or is
    handed on from the first block (T5's position bias), is then as it should be.
    """
    last = len(block_list(module_of(model), blocks)) - 1
    calls: list[BlockCall] = []
    states: list[Any] = []

    def listen(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index != len(calls):
            raise CollectionError(
                f"{blocks}: block {index} is called after block {len(calls) - 1}; only models that run their blocks one by one in order can be"
                " walked. Name another list with `blocks`."
            )
        call, hidden = BlockCall.of(args, kwargs, f"{blocks}.{index}")
        calls.append(call)
        if index == 0:
            states.append(hidden.clone())
            states.append(forward(*args, **kwargs) if form is None else with_hidden(form, hidden.clone()))
        if index == last:
            raise Stop
        return states[1]

    try:
        with replaced(module_of(model), blocks, listen):
            call_model(model, batch)
    except BodyEnd:
        pass
    except Stop:
        return calls, states[0], with_hidden(states[1], torch.empty(0))
    raise CollectionError(
        f"{blocks}: the model called {len(calls)} of its {last + 1} blocks for a calibration batch, so it cannot be walked block by block."
    )


@contextmanager
def replaced(model: nn.Module, blocks: str, forward: Callable[..., Any]) -> Iterator[None]:
    """Each block's forward is `forward(index, its own forward, args, kwargs)`. The modules stay in place, since models read attributes of theirs."""
    with ExitStack() as stack:
        for index, item in enumerate(block_list(model, blocks)):

            def stand_in(*args: Any, _index: int = index, _own: Any = item.forward, **kwargs: Any) -> Any:
                return forward(_index, _own, args, kwargs)

            stack.enter_context(forwarding(item, stand_in))
        yield


@contextmanager
def forwarding(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in the place of the module's own; its hooks stay."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def block_list(model: nn.Module, blocks: str) -> nn.ModuleList:
    found = model.get_submodule(blocks)
    assert isinstance(found, (nn.ModuleList, nn.Sequential))
    return found  # type: ignore[return-value]


def hidden_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    first = next(iter(output.values() if isinstance(output, Mapping) else output), None)
    if not isinstance(first, Tensor):
        raise CollectionError(f"A block gave a {type(output).__name__} whose first part is no tensor of hidden states.")
    return first


def only_hidden(form: Any) -> bool:
    return isinstance(form, Tensor) or (isinstance(form, (tuple, list)) and len(form) == 1)


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A block's output with other hidden states in it."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[next(iter(output))] = hidden
        return changed
    return (hidden, *output[1:])


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No part of the model keeps keys and values for a next token; an encoder and a decoder have configs of their own."""
    configs = {id(c): c for c in (getattr(part, "config", None) for part in model.modules())}.values()
    caching: list[Any] = [config for config in configs if getattr(config, "use_cache", None)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True

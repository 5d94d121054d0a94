"""Chains: lists of blocks through which a model's hidden states go one by one. An encoder has one, an encoder with a decoder two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.errors import ConfigError
from bmm_engine.models.architecture import is_head, linear_module
from bmm_engine.models.blocks import (
    BlockCall,
    Runnable,
    block_list,
    hidden_of,
    is_cache,
    module_of,
    only_hidden,
    replaced,
    with_hidden,
)
from bmm_engine.models.calling import Stop, call_model
from bmm_engine.models.heads import body_of

# Blocks that run, to see what those of a list give; what the others would give is told from theirs.
RUN = 2


class NoChainError(Stop):
    """The hidden states of a model do not go from block to block: it says why."""


def find_chains(model: nn.Module, pattern: str | None = None) -> tuple[str, ...]:
    """The lists of blocks of a model, or those that `pattern` names, in the order in which it has them: the outermost lists of modules with linear
    modules in them, those of one class of one shape; heads have none. Raises `ConfigError` for a pattern without a match."""
    found: list[str] = []
    for name, module in model.named_modules():
        if name and not any(name.startswith(f"{outer}.") for outer in found) and _is_chain(module):
            if pattern is None and is_head(name, model):
                continue
            if pattern is None or fnmatchcase(name, pattern):
                found.append(name)
    if pattern is not None and not found:
        there = ", ".join(find_chains(model)) or "none"
        raise ConfigError(
            f"blocks: {type(model).__name__} has no list of blocks that matches {pattern!r}; it has {there}. Name one of them, or leave `blocks` out."
        )
    return tuple(found)


def _is_chain(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
        return False
    shapes: dict[tuple[type[nn.Module], str], torch.Size] = {}
    for item in module:
        if isinstance(item, (nn.ModuleList, nn.ModuleDict)) or linear_module("", item) is not None:
            return False
        if not any(linear_module(name, inner) for name, inner in item.named_modules()):
            return False
        # A first block may have more (T5's position bias), but no other widths.
        for name, parameter in item.named_parameters():
            if shapes.setdefault((type(item), name), parameter.shape) != parameter.shape:
                return False
    return True


def order_chains(model: Runnable, chains: Sequence[str], batch: Any) -> tuple[str, ...]:
    """Those of the chains that the batch reaches, in the order in which the model calls them. The first `RUN` blocks of each must have their tensors;
    no other block is run.

    Raises `NoChainError` where hidden states are not all that goes from block to block: a list is called in another order, or twice, or beside
    another; something is done between two blocks; what comes after a list reads what lies between its blocks; or what else a block is called with
    depends on the hidden states.
    """
    first = _Pass(module_of(model), chains)
    first.run(model, batch)
    second = _Pass(module_of(model), chains, first)
    second.run(model, batch)
    told = "what lies between {}'s blocks is read by what comes after them"
    done: list[str] = []
    for chain, calls in first.calls.items():
        if done and not _equal(
            (calls[0].hidden, calls[0].others), (second.calls[chain][0].hidden, second.calls[chain][0].others)
        ):
            raise NoChainError(told.format(" or ".join(done)))
        done.append(chain)
        for index, (ours, theirs) in enumerate(zip(calls, second.calls[chain], strict=True)):
            if index and not _equal(ours.others, theirs.others):
                raise NoChainError(f"what {chain}.{index} is called with depends on what the blocks before it give")
    if first.unlike:
        _check_unread(model, chains, batch, first)
    if done and not _equal(first.result, second.result):
        raise NoChainError(told.format(" or ".join(done)))
    return tuple(first.calls)


def _check_unread(model: Runnable, chains: Sequence[str], batch: Any, first: _Pass) -> None:
    """Blocks that give more than hidden states, each something else (attention weights): no block may read that of another. Raises `NoChainError`."""
    third = _Pass(module_of(model), chains, first, shift_rest=True)
    third.run(model, batch)
    for chain, why in first.unlike.items():
        pairs = zip(first.calls[chain], third.calls[chain], strict=True)
        if not all(_equal(ours.others, theirs.others) for ours, theirs in pairs):
            raise NoChainError(why)


@dataclass(frozen=True)
class _Seen:
    hidden: Tensor
    others: Any


class _Pass:
    """One pass of a batch through a model whose blocks are watched. After an `earlier` one none of them runs, and hidden states are others within
    each chain, though not at its end; with `shift_rest` so is all that blocks give beside them."""

    def __init__(
        self, model: nn.Module, chains: Sequence[str], earlier: _Pass | None = None, *, shift_rest: bool = False
    ):
        self.model, self.chains, self.earlier, self.shift_rest = model, chains, earlier, shift_rest
        self.unlike: dict[str, str] = {}  # chains whose blocks give more than hidden states, and not all the same
        self.given = False  # a cache with the batch: it grows with every pass, of the whole model too
        self.result: Tensor | None = None  # the body's first
        self.ends: dict[str, Tensor] = {}
        self.forms: dict[str, Any] = {}
        self.calls: dict[str, list[_Seen]] = {}
        self._count = {chain: len(block_list(model, chain)) for chain in chains}
        self._last: Tensor | None = None

    def run(self, model: Runnable, batch: Any) -> None:
        given = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else ()
        self.given = any(map(is_cache, given))
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            # Before whatever ends the pass there.
            body = body_of(self.model)
            stack.callback(body.register_forward_hook(self._keep, prepend=True).remove)
            for chain in self.chains:
                stack.enter_context(replaced(self.model, chain, self._listener(chain)))
            try:
                call_model(model, batch)
            except NoChainError:
                raise
            except Stop:
                pass
        for chain, calls in self.calls.items():
            if len(calls) != self._count[chain]:
                raise NoChainError(f"{len(calls)} of the {self._count[chain]} blocks of {chain} are called")

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        values = output.values() if isinstance(output, Mapping) else output
        found = output if isinstance(output, Tensor) else next((v for v in values if isinstance(v, Tensor)), None)
        self.result = None if found is None else found.clone()

    def _listener(self, chain: str) -> Callable[..., Any]:
        def listen(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls = self.calls.setdefault(chain, [])
            if index != len(calls) or next(reversed(self.calls)) != chain:
                raise NoChainError(
                    f"{chain}.{index} is called after {len(calls)} blocks of its list, or beside another list"
                )
            if not self.given and any(map(is_cache, (*args, *kwargs.values()))):
                raise NoChainError(f"the model makes a cache for {chain}.{index} whatever its config says")
            call, hidden = BlockCall.of(args, kwargs, f"{chain}.{index}")
            if any(value is hidden for value in call.values()):
                raise NoChainError(f"{chain}.{index} is called with its hidden states twice")
            if index and not (self._last is not None and _equal(hidden, self._last)):
                raise NoChainError(f"what {chain}.{index - 1} gives is changed before {chain}.{index} reads it")
            calls.append(_Seen(hidden.clone(), _copied(call.values())))
            output = self._output(chain, index, forward, args, kwargs, hidden)
            self._last = self.ends[chain] = hidden_of(output).clone()
            return output

        return listen

    def _output(
        self, chain: str, index: int, forward: Callable[..., Any], args: Any, kwargs: Any, hidden: Tensor
    ) -> Any:
        if self.earlier is not None:
            at_end = index == self._count[chain] - 1
            form = self.earlier.forms[chain]
            form = _shifted(form) if self.shift_rest else form
            return with_hidden(form, self.earlier.ends[chain] if at_end else hidden + 1)
        if index >= RUN:
            return with_hidden(self.forms[chain], hidden + 0)
        output = forward(*args, **kwargs)
        if hidden_of(output).shape != hidden.shape:
            raise NoChainError(f"{chain}.{index} gives hidden states of another shape than it reads")
        if index and not only_hidden(output) and not _equal(_rest(self.forms[chain]), _rest(output)):
            self.unlike[chain] = f"{chain}.{index} gives more than hidden states, and not what {chain}.0 gives"
        self.forms.setdefault(chain, output)
        return output


def _rest(output: Any) -> Any:
    return list(output.values() if isinstance(output, dict) else output)[1:] if not isinstance(output, Tensor) else []


def _shifted(value: Any) -> Any:
    """Other numbers in all tensors of floats."""
    if isinstance(value, Tensor):
        return value + 1 if value.is_floating_point() else value
    if isinstance(value, dict):
        changed: Any = copy.copy(value)
        changed.update({key: _shifted(own) for key, own in value.items()})
        return changed
    return type(value)(map(_shifted, value)) if type(value) in (tuple, list) else value


def _copied(values: Iterable[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def _equal(ours: Any, theirs: Any) -> bool:
    """Tensors by value; what is neither tensor nor collection of them counts as equal."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.shape == theirs.shape and bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_equal(ours[key], theirs[key]) for key in ours)
    return not isinstance(ours, Tensor) and not isinstance(theirs, Tensor)

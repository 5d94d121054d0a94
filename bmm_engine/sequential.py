"""Grams measured while merging: each expert's block reads what the already merged blocks below it give (RegMean++, arXiv 2508.03121).

    collect_sequential(base, experts, batches) -> one GramSet per expert, of kind "sequential"

`BlockWalk` carries hidden states through the blocks of a model, one block at a time, so that a walk costs one pass of every model in all.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.anchors import Anchor, DepthMap, Parameters, Site, get_anchor
from bmm_engine.anchors.settings import Each
from bmm_engine.architecture import (
    LinearModule,
    checkpoint_names,
    is_head,
    linear_module,
    linear_modules,
)
from bmm_engine.collect import Mask, Recorder, call_model, evaluating, mask_of, placement, to_device
from bmm_engine.errors import (
    CollectionError,
    ConfigError,
    EmptyCalibrationError,
    GramMismatchError,
    MissingTensorError,
    ShapeMismatchError,
)
from bmm_engine.grams import GramSet
from bmm_engine.moments import DenseMoment
from bmm_engine.progress import track

KIND = "sequential"


def collect_sequential(
    base: nn.Module,
    experts: Sequence[nn.Module],
    batches: Sequence[Iterable[Any]],
    *,
    anchor: str = "regmean_plusplus",
    modules: Iterable[str] | None = None,
    blocks: str | None = None,
    mask: Mask = "attention_mask",
    calibration: Sequence[str] | None = None,
    backend: str = "auto",
    progress: bool | None = None,
    **parameters: Any,
) -> list[GramSet]:
    """Walk from input to output and merge on the way; at each block measure what every expert's linear modules read there.

    `batches[t]`: expert t's calibration, as for `collect_grams`. Per block: expert t's own block reads the hidden states that the merged blocks
    below give for task t's data; its linear modules' Grams are measured; `anchor`, a rule on Grams, with its `parameters` (`shrink`, `weight`,
    ...), merges the block's linear modules; everything else is the mean of the experts; the merged block gives the next hidden states.
    What stands before the blocks counts as a block of its own, and so does what stands after them; heads are left out.

    `blocks`: name (or shell pattern) of the list of blocks; by default the longest list of modules of one class. `modules`, `mask`, `backend`:
    as for `collect_grams`. The models must be of one architecture, on one device; they are left as they were. Held at a time: all models, one
    copy of the base, all Grams, and the hidden states of all batches.

    Merge the result with the same rule and parameters, over the same experts. Raises what `collect_grams` and the rule raise, and
    `ShapeMismatchError`, `MissingTensorError` for models that do not fit together.
    """
    rule = get_anchor(anchor)
    if rule.scope != "module" or not rule.needs_grams:
        raise ConfigError(
            f"anchor {anchor!r} does not merge linear modules by Grams, so there is nothing to measure for it."
        )
    rule.check_experts(len(experts))
    labels = list(calibration) if calibration is not None else [""] * len(experts)
    if len(batches) != len(experts) or len(labels) != len(experts):
        raise ConfigError(
            f"{len(experts)} experts, {len(batches)} calibration sets and {len(labels)} descriptions of them; give one of each for each expert."
        )
    walk = _SequentialMerge(base, experts, rule, rule.parameters(parameters), modules, blocks, backend)
    sets = walk.run([list(own) for own in batches], mask, labels, progress)
    digests = [_digest(own) for own in sets]
    for own in sets:
        own.kind = KIND
        own.settings = {"rule": rule.name, "parameters": _plain(walk.parameters), "experts": digests}
    return sets


def check_sequential(grams: Sequence[GramSet], anchor: str, parameters: Mapping[str, Any]) -> None:
    """Raise `GramMismatchError` unless `grams` come from one walk over these experts, in this order, with this rule and these parameters."""
    wanted = {"rule": anchor, "parameters": _plain(get_anchor(anchor).parameters(parameters))}
    for own in grams:
        if own.kind != KIND:
            raise GramMismatchError(
                f"{own.where}: its Grams are of the kind {own.kind!r}, {anchor} needs {KIND!r} ones, measured while the experts are merged. Collect"
                " them with `collect_sequential`."
            )
        found = {key: own.settings.get(key) for key in wanted}
        if found != wanted:
            raise GramMismatchError(
                f"{own.where}: collected while merging by {found['rule']} with {found['parameters']}, but the merge is {anchor} with"
                f" {wanted['parameters']}. Merge with the same, or collect again."
            )
    digests = [_digest(own) for own in grams]
    for own in grams:
        if own.settings.get("experts") != digests:
            raise GramMismatchError(
                f"{own.where}: collected beside other experts, or these in another order. Grams of a sequential walk belong together: give all of"
                " one walk, in its order, or collect again."
            )


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


class _Stop(Exception):
    """Ends a forward pass that has come far enough."""


@dataclass(frozen=True)
class _Call:
    """How the model calls one block, the hidden states left out: `key` says where they go."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: int | str

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], block: str) -> tuple[_Call, Tensor]:
        for value in (*args, *kwargs.values()):
            if type(value).__name__.endswith("Cache"):
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

    def __call__(self, block: nn.Module, hidden: Tensor) -> Any:
        if isinstance(self.key, int):
            return block(hidden, *self.args[1:], **self.kwargs)
        return block(*self.args, **{**self.kwargs, self.key: hidden})


class BlockWalk:
    """Calibration batches on their way through the blocks of a model: hidden states are carried from block to block.

    Made with the model whose embeddings they start from: it reads each batch once, up to its last block, and what it hands to every block
    beside the hidden states (masks, rotary angles) is kept. Then, block by block, any module may stand in for block `index`:

        output = walk.call(batch, index, block)     # on the hidden states carried so far, which stay as they are
        walk.advance(batch, output)                 # these are the next ones
        walk.finish(batch, model)                   # after the last block: what comes after the blocks, in any model of the architecture
    """

    def __init__(self, model: nn.Module, blocks: str, batches: Iterable[Any], mask: Mask):
        """`blocks`: the name of the list, as `find_blocks` gives it. Raises `CollectionError`, `EmptyCalibrationError`."""
        device, _ = placement(model)
        self.batches = [to_device(batch, device) for batch in batches]
        self.masks = [mask_of(batch, mask) for batch in self.batches]
        self.hidden: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        self._outputs: list[Any] = [None] * len(self.batches)
        with torch.inference_mode():
            for batch in self.batches:
                calls, hidden = _record(model, blocks, batch)
                self._calls.append(calls)
                self.hidden.append(hidden)

    def __len__(self) -> int:
        """Batches."""
        return len(self.batches)

    def call(self, batch: int, index: int, block: nn.Module) -> Any:
        """What `block`, in the place of block `index`, gives for the hidden states of batch number `batch`."""
        with torch.inference_mode():
            # A block may add to its input in place, and the next one to be asked must find it as it was.
            return self._calls[batch][index](block, self.hidden[batch].clone())

    def advance(self, batch: int, output: Any) -> None:
        """Carry on with a block's `output`."""
        self.hidden[batch] = _hidden_of(output)
        self._outputs[batch] = output

    def finish(self, batch: int, model: nn.Module, blocks: str) -> None:
        """Run `model` on the batch with the carried output in the place of its blocks."""
        with torch.inference_mode(), _replaced(model, blocks, lambda *_: self._outputs[batch]):
            call_model(model, self.batches[batch])


def _record(model: nn.Module, blocks: str, batch: Any) -> tuple[list[_Call], Tensor]:
    """How `model` calls each of its blocks, and the hidden states that the first one gets.

    The first block runs, and its output stands for that of all others: what depends on the form of an output, or is handed on from the first
    block (T5's position bias), is then as it should be.
    """
    last = len(_block_list(model, blocks)) - 1
    calls: list[_Call] = []
    states: list[Any] = []

    def listen(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index != len(calls):
            raise CollectionError(
                f"{blocks}: block {index} is called after block {len(calls) - 1}; only models that run their blocks one by one in order can be"
                " walked. Name another list with `blocks`."
            )
        call, hidden = _Call.of(args, kwargs, f"{blocks}.{index}")
        calls.append(call)
        if index == 0:
            states.append(hidden.clone())
        if index == last:
            raise _Stop
        if index == 0:
            states.append(forward(*args, **kwargs))
        return states[1]

    try:
        with _replaced(model, blocks, listen):
            call_model(model, batch)
    except _Stop:
        return calls, states[0]
    raise CollectionError(
        f"{blocks}: the model called {len(calls)} of its {last + 1} blocks for a calibration batch, so it cannot be walked block by block."
    )


@contextmanager
def _replaced(model: nn.Module, blocks: str, forward: Callable[..., Any]) -> Iterator[None]:
    """Each block's forward is `forward(index, its own forward, args, kwargs)`. The modules stay in place, since models read attributes of theirs."""
    items = list(_block_list(model, blocks))
    before = [item.__dict__.get("forward") for item in items]
    for index, item in enumerate(items):
        own = item.forward

        def stand_in(*args: Any, _index: int = index, _own: Any = own, **kwargs: Any) -> Any:
            return forward(_index, _own, args, kwargs)

        item.forward = stand_in
    try:
        yield
    finally:
        for item, kept in zip(items, before, strict=True):
            del item.forward
            if kept is not None:
                item.forward = kept


def _block_list(model: nn.Module, blocks: str) -> nn.ModuleList:
    found = model.get_submodule(blocks)
    assert isinstance(found, (nn.ModuleList, nn.Sequential))
    return found  # type: ignore[return-value]


def _hidden_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    first = next(iter(output.values() if isinstance(output, Mapping) else output), None)
    if not isinstance(first, Tensor):
        raise CollectionError(f"A block gave a {type(output).__name__} whose first part is no tensor of hidden states.")
    return first


class _SequentialMerge:
    """The merged-so-far model, the experts, and what each of them has read."""

    def __init__(
        self,
        base: nn.Module,
        experts: Sequence[nn.Module],
        rule: Anchor,
        parameters: Parameters,
        modules: Iterable[str] | None,
        blocks: str | None,
        backend: str,
    ):
        self.experts, self.rule, self.parameters = experts, rule, parameters
        self.modules = linear_modules(base, modules)
        if not self.modules:
            raise ConfigError(f"{type(base).__name__} has no linear modules to measure; name some with `modules`.")
        device, _ = placement(base)
        for t, expert in enumerate(experts):
            if placement(expert)[0] != device:
                raise ConfigError(f"expert {t} is on {placement(expert)[0]}, the base on {device}; move one of them.")
        self.base = base
        self.blocks = find_blocks(base, blocks)
        self.names = [_Names(base, expert, t) for t, expert in enumerate(experts)]
        self.recorders = [
            Recorder(
                expert,
                {own.module(name): replace(m, name=own.module(name)) for name, m in self.modules.items()},
                backend,
            )
            for expert, own in zip(experts, self.names, strict=True)
        ]
        self.merged = _mean_model(base, experts, self.names)
        saved = checkpoint_names(base)
        self.saved = {name: saved.get(f"{name}.weight", f"{name}.weight") for name in self.modules}
        self.depth = DepthMap(self.saved.values())

    def run(
        self, batches: Sequence[Sequence[Any]], mask: Mask, calibration: Sequence[str], progress: bool | None
    ) -> list[GramSet]:
        count = len(_block_list(self.merged, self.blocks))
        inside = {name for name in self.modules if name.startswith(f"{self.blocks}.")}
        outside = [name for name in self.modules if name not in inside]
        for t, own in enumerate(batches):
            if not own:
                raise EmptyCalibrationError(f"expert {t}: its calibration set is empty: no batches.")
        with ExitStack() as stack:
            for model in (self.merged, *self.experts):
                stack.enter_context(evaluating(model))
                stack.enter_context(_without_cache(model))
            if outside:
                for t, own in enumerate(batches):
                    self._read_before_blocks(t, own, mask, outside)
            before = [name for name in outside if self.names[0].module(name) in self.recorders[0].leader]
            self._merge(before)
            walks = [BlockWalk(self.merged, self.blocks, own, mask) for own in batches]
            for index in track(range(count), "collecting Grams block by block", show=progress):
                names = [name for name in self.modules if name.startswith(f"{self.blocks}.{index}.")]
                for t, walk in enumerate(walks):
                    block = self.experts[t].get_submodule(f"{self.names[t].module(self.blocks)}.{index}")
                    self._listen(t, walk, names, partial(walk.call, index=index, block=block))
                self._merge(names)
                merged = self.merged.get_submodule(f"{self.blocks}.{index}")
                for walk in walks:
                    for batch in range(len(walk)):
                        walk.advance(batch, walk.call(batch, index, merged))
            after = [name for name in outside if name not in before]
            if after:
                for t, walk in enumerate(walks):
                    path = self.names[t].module(self.blocks)
                    self._listen(t, walk, after, partial(walk.finish, model=self.experts[t], blocks=path))
        labels = [label or f"{len(own)} batches" for label, own in zip(calibration, batches, strict=True)]
        return [recorder.finish(label) for recorder, label in zip(self.recorders, labels, strict=True)]

    def _read_before_blocks(self, t: int, batches: Sequence[Any], mask: Mask, names: Sequence[str]) -> None:
        expert, recorder = self.experts[t], self.recorders[t]
        device, _ = placement(expert)

        def stop(*_: Any) -> Any:
            raise _Stop

        with recorder.hooked(self.names[t].module(name) for name in names), torch.inference_mode():
            for batch in batches:
                batch = to_device(batch, device)
                with recorder.batch(mask_of(batch, mask)), _replaced(expert, self.names[t].module(self.blocks), stop):
                    try:
                        call_model(expert, batch)
                    except _Stop:
                        continue
                raise CollectionError(f"expert {t}: a calibration batch does not reach the first of its {self.blocks}.")

    def _listen(self, t: int, walk: BlockWalk, names: Sequence[str], run: Callable[[int], Any]) -> None:
        recorder = self.recorders[t]
        with recorder.hooked(self.names[t].module(name) for name in names):
            for batch in range(len(walk)):
                with recorder.batch(walk.masks[batch]):
                    run(batch)

    @torch.no_grad()
    def _merge(self, names: Sequence[str]) -> None:
        """Put the rule's result in the place of the merged model's modules called `names`."""
        for name in names:
            module, weight = self.modules[name], self.saved[name]
            grams = []
            for own, recorder in zip(self.names, self.recorders, strict=True):
                leader = recorder.leader.get(own.module(name))
                if leader is None:
                    raise CollectionError(
                        f"{name}: is never called where it stands, in or beside {self.blocks}. Leave it out with `modules`."
                    )
                gram = recorder.grams[leader]
                grams.append(DenseMoment(gram.total, gram.rows, module=name))
            base = _oriented(self.base, name, module)
            experts = [_oriented(e, own.module(name), module) for e, own in zip(self.experts, self.names, strict=True)]
            resolved = self.parameters.at(weight, self.depth(weight), len(experts))
            solved = self.rule.apply(Site(weight, base, experts, resolved, tuple(base.shape), 0, True, grams))
            target = self.merged.get_submodule(name).get_parameter("weight")
            target.copy_(solved.mT if module.transposed else solved)


class _Names:
    """The base's names in an expert, which may carry the architecture's prefix where the base does not, or the other way round."""

    def __init__(self, base: nn.Module, expert: nn.Module, number: int):
        self.number = number
        self._modules = dict(expert.named_modules())
        self._prefixes = [getattr(model, "base_model_prefix", "") for model in (base, expert)]

    def module(self, name: str) -> str:
        """Raises `MissingTensorError`."""
        found = self.find(name)
        if found is None:
            raise MissingTensorError(
                f"expert {self.number}: has no module {name!r}, the base has. All models must be of one architecture."
            )
        return found

    def find(self, name: str) -> str | None:
        if name in self._modules:
            return name
        for prefix in filter(None, self._prefixes):
            other = name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"
            if other in self._modules:
                return other
        return None


@torch.no_grad()
def _mean_model(base: nn.Module, experts: Sequence[nn.Module], names: Sequence[_Names]) -> nn.Module:
    """A copy of the base with the mean of the experts in every floating-point tensor but the heads'.

    Raises `MissingTensorError`, `ShapeMismatchError`.
    """
    merged = copy.deepcopy(base)
    for name, tensor in merged.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if not tensor.is_floating_point() or (module and is_head(module, base)):
            continue
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        total = torch.zeros_like(wide)
        for t, (expert, own) in enumerate(zip(experts, names, strict=True)):
            found = expert.get_submodule(own.module(module)).state_dict().get(leaf)
            if found is None or found.shape != tensor.shape:
                shape = "none" if found is None else str(tuple(found.shape))
                raise ShapeMismatchError(
                    f"expert {t}, tensor {name!r}: the base's is {tuple(tensor.shape)}, the expert's {shape}. All models must be of one shape."
                )
            total += found.to(wide) - wide
        tensor.copy_(wide + total / len(experts))
    return merged


def _oriented(model: nn.Module, name: str, module: LinearModule) -> Tensor:
    """The weight as (out, in), in float32 or wider."""
    weight = model.get_submodule(name).get_parameter("weight").detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight.mT.contiguous() if module.transposed else weight


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if not before:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def _plain(parameters: Parameters) -> Any:
    """A rule's parameters as JSON has them, defaults filled in."""
    raw = {key: s.raw.value if isinstance(s.raw, Each) else s.raw for key, s in parameters.settings.items()}
    return json.loads(json.dumps(raw))


def _digest(grams: GramSet) -> str:
    """A hash of the model that `grams` were measured on."""
    return hashlib.sha256(json.dumps(grams.fingerprints, sort_keys=True).encode()).hexdigest()[:16]

"""Grams measured while merging: each expert's block reads what the already merged blocks below it give (RegMean++, arXiv 2508.03121).

    collect_sequential(base, experts, batches) -> one GramSet per expert, of kind "sequential"

Hidden states are carried from block to block (`bmm_engine.models.blocks`), so that a walk costs one pass of every model in all.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.anchors import Anchor, DepthMap, Parameters, Site, get_anchor
from bmm_engine.anchors.contract import GRAMS
from bmm_engine.anchors.settings import Each
from bmm_engine.errors import (
    CollectionError,
    ConfigError,
    EmptyCalibrationError,
    GramMismatchError,
    MissingTensorError,
    ShapeMismatchError,
)
from bmm_engine.models.architecture import (
    LinearModule,
    is_head,
    linear_modules,
    nothing_to_solve,
)
from bmm_engine.models.blocks import BlockWalk, before_blocks, block_list, find_blocks, without_cache
from bmm_engine.models.calling import Mask, evaluating, padding_of, placement, to_device
from bmm_engine.models.heads import without_heads
from bmm_engine.models.naming import checkpoint_names
from bmm_engine.progress import track
from bmm_engine.solving.moments import DenseMoment
from bmm_engine.statistics.collect import Recorder
from bmm_engine.statistics.grams import GramSet

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
    resolved = rule.parameters(parameters)
    if rule.scope != "module" or rule.needs_of(resolved) not in [{need} for need in GRAMS]:
        raise ConfigError(
            f"anchor {anchor!r} does not merge linear modules by Grams, so there is nothing to measure for it."
        )
    rule.check_experts(len(experts))
    labels = list(calibration) if calibration is not None else [""] * len(experts)
    if len(batches) != len(experts) or len(labels) != len(experts):
        raise ConfigError(
            f"{len(experts)} experts, {len(batches)} calibration sets and {len(labels)} descriptions of them; give one of each for each expert."
        )
    walk = _SequentialMerge(base, experts, rule, resolved, modules, blocks, backend)
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
            raise ConfigError(nothing_to_solve(base))
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
        count = len(block_list(self.merged, self.blocks))
        inside = {name for name in self.modules if name.startswith(f"{self.blocks}.")}
        outside = [name for name in self.modules if name not in inside]
        for t, own in enumerate(batches):
            if not own:
                raise EmptyCalibrationError(f"expert {t}: its calibration set is empty: no batches.")
        with ExitStack() as stack:
            for model in (self.merged, *self.experts):
                stack.enter_context(evaluating(model))
                stack.enter_context(without_cache(model))
                stack.enter_context(without_heads(model, self.modules))
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
                    walk.blocks = self.names[t].module(self.blocks)
                    self._listen(t, walk, after, partial(walk.finish, model=self.experts[t]))
        labels = [label or f"{len(own)} batches" for label, own in zip(calibration, batches, strict=True)]
        return [recorder.finish(label) for recorder, label in zip(self.recorders, labels, strict=True)]

    def _read_before_blocks(self, t: int, batches: Sequence[Any], mask: Mask, names: Sequence[str]) -> None:
        expert, recorder = self.experts[t], self.recorders[t]
        device, _ = placement(expert)
        with recorder.hooked(self.names[t].module(name) for name in names), torch.inference_mode():
            for batch in batches:
                batch = to_device(batch, device)
                with recorder.batch(padding_of(expert, batch, mask)):
                    before_blocks(expert, self.names[t].module(self.blocks), batch)

    def _listen(self, t: int, walk: BlockWalk, names: Sequence[str], run: Callable[[int], Any]) -> None:
        recorder = self.recorders[t]
        with recorder.hooked(self.names[t].module(name) for name in names):
            for batch in range(len(walk)):
                with recorder.batch(walk.padding[batch]):
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


def _plain(parameters: Parameters) -> Any:
    """A rule's parameters as JSON has them, defaults filled in."""
    raw = {key: s.raw.value if isinstance(s.raw, Each) else s.raw for key, s in parameters.settings.items()}
    return json.loads(json.dumps(raw))


def _digest(grams: GramSet) -> str:
    """A hash of the model that `grams` were measured on."""
    return hashlib.sha256(json.dumps(grams.fingerprints, sort_keys=True).encode()).hexdigest()[:16]

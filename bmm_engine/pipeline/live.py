"""Live models of all tasks that share the merged parameters, so that one write shows in all of them; heads stay each task's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bmm_engine.errors import CheckpointError
from bmm_engine.evaluators.heads import EncoderWithHead
from bmm_engine.merging.align import Alignment
from bmm_engine.merging.hosting import refuse_other_network
from bmm_engine.merging.live_names import live_names
from bmm_engine.models.conversion import Conversion, to_live

# What is fused, and by their live names the tensors that it makes.
Fused = tuple[Conversion, dict[str, Tensor]]


@dataclass
class LiveModels:
    """`models` by task; `parameters`: base tensor name -> the one tensor that all of them read, in the layout of the base's file. Of tensors that
    transformers fuses it is a copy: who writes to it says so to `settle`. `fused`: those conversions, each with the tensors that all models read."""

    models: dict[str, nn.Module]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    fused: list[Fused] = field(default_factory=list)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Write merged tensors, by the base's names; those that no model reads are passed over."""
        for name, tensor in tensors.items():
            if name in self.parameters:
                self.parameters[name].copy_(tensor)
        self.settle(tensors)

    @torch.no_grad()
    def settle(self, names: Iterable[str]) -> None:
        """Have the models read what was written to the parameters `names`."""
        written = set(names)
        for conversion, targets in self.fused:
            if not written.isdisjoint(conversion.inputs):
                for name, made in conversion.run({n: self.parameters[n] for n in conversion.inputs}).items():
                    targets[name].copy_(made)


def share_parameters(
    alignment: Alignment,
    models: Iterable[tuple[str, int | None, Callable[[], nn.Module]]],
) -> LiveModels:
    """Build the tasks' models one by one, each (task, expert's index or None for the base's own architecture, how to make it), and tie
    what is merged, or kept from the base, to the first one's tensors.

    The tied tensors hold the first model's values until `load`.
    Raises `CheckpointError` for a merged tensor that a live model lacks, or has in another shape.
    """
    refuse_other_network(alignment.hosted, "what is evaluated")
    live = LiveModels({})
    fused: dict[tuple[str, ...], Fused] = {}  # by the names of what is fused
    for task, expert, make in models:
        model = make().eval().requires_grad_(False)
        found, own = _live_tensors(alignment, expert, model)
        pairs = [(name, live.parameters.setdefault(name, tensor), tensor) for name, tensor in found.items()]
        for conversion, targets in own:
            _, first = fused.setdefault(conversion.inputs, (conversion, targets))
            pairs += [(conversion.inputs[0], *pair) for pair in zip(first.values(), targets.values(), strict=True)]
        for name, shared, tensor in pairs:
            if shared is tensor:
                continue
            if shared.shape != tensor.shape:
                raise CheckpointError(
                    f"{name}: {tuple(tensor.shape)} in the live model of task {task!r}, {tuple(shared.shape)} in another's; they cannot share it."
                )
            _replace(model, tensor, shared)
        live.models[task] = model
    live.fused.extend(fused.values())
    for conversion, targets in live.fused:
        like = next(iter(targets.values()))
        for name in conversion.inputs:
            live.parameters[name] = like.new_zeros(alignment.base.spec(name).shape)
    live.load({name: alignment.base.load(name) for name in alignment.kept if name in live.parameters})
    return live


def _live_tensors(alignment: Alignment, expert: int | None, model: nn.Module) -> tuple[dict[str, Tensor], list[Fused]]:
    """Base tensor name -> the live tensor that it becomes in `model`; and those that are made of several of the base's, or several of one."""
    # A bare encoder within a wrapper (a head of its own) is known by the encoder's names.
    inner = model.encoder if isinstance(model, EncoderWithHead) else model
    state = inner.state_dict(keep_vars=True)
    specs = {n: alignment.base.spec(n) for n in (*alignment.merged, *alignment.kept)}
    made = to_live(inner, {n: (spec.shape, spec.dtype) for n, spec in specs.items()})
    sources = {name for conversion in made for name in conversion.inputs}
    found: dict[str, Tensor] = {}
    for name, live in live_names(alignment, expert, inner, sources).items():
        if name in sources:
            continue
        tensor = state[live]
        if any(tensor is other for other in found.values()):  # tied here, and two tensors in the merge
            parent, _, key = live.rpartition(".")
            tensor = nn.Parameter(tensor.detach().clone(), requires_grad=False)
            inner.get_submodule(parent).register_parameter(key, tensor)
        found[name] = tensor
    for name, tensor in found.items():
        stored = tuple(alignment.base.spec(name).shape)
        if tuple(tensor.shape) != stored:
            raise CheckpointError(
                f"{name}: {stored} in the base's file, {tuple(tensor.shape)} in the live {type(model).__name__}."
            )
    return found, [(own, {name: state[name] for name in own.outputs}) for own in made]


def _replace(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put `new` wherever `model` has `old`: a tied tensor is in several places."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is old:
                    table[key] = new  # type: ignore[assignment]

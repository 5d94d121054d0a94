"""Live models of all tasks that share the merged parameters, so that one write shows in all of them; heads stay each task's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bmm_engine.errors import CheckpointError
from bmm_engine.evaluators.heads import EncoderWithHead
from bmm_engine.merging.align import Alignment
from bmm_engine.merging.live_names import live_names


@dataclass
class LiveModels:
    """`models` by task; `parameters`: base tensor name -> the one tensor that all of them read, in the layout of the base's file."""

    models: dict[str, nn.Module]
    parameters: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Write merged tensors, by the base's names; those that no model reads are passed over."""
        for name, tensor in tensors.items():
            if name in self.parameters:
                self.parameters[name].copy_(tensor)


def share_parameters(
    alignment: Alignment,
    models: Iterable[tuple[str, int | None, Callable[[], nn.Module]]],
) -> LiveModels:
    """Build the tasks' models one by one, each (task, expert's index or None for the base's own architecture, how to make it), and tie
    what is merged, or kept from the base, to the first one's tensors.

    The tied tensors hold the first model's values until `load`.
    Raises `CheckpointError` for a merged tensor that a live model lacks, or has in another shape.
    """
    live = LiveModels({})
    for task, expert, make in models:
        model = make().eval().requires_grad_(False)
        found = _live_tensors(alignment, expert, model)
        for name, tensor in found.items():
            shared = live.parameters.setdefault(name, tensor)
            if shared is tensor:
                continue
            if shared.shape != tensor.shape:
                raise CheckpointError(
                    f"{name}: {tuple(tensor.shape)} in the live model of task {task!r}, {tuple(shared.shape)} in another's; they cannot share it."
                )
            _replace(model, tensor, shared)
        live.models[task] = model
    for name in alignment.kept:
        if name in live.parameters:
            live.parameters[name].copy_(alignment.base.load(name))
    return live


def _live_tensors(alignment: Alignment, expert: int | None, model: nn.Module) -> dict[str, Tensor]:
    """Base tensor name -> the live tensor that it becomes in `model`."""
    # A bare encoder within a wrapper (a head of its own) is known by the encoder's names.
    inner = model.encoder if isinstance(model, EncoderWithHead) else model
    state = inner.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    for name, live in live_names(alignment, expert, inner).items():
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
    return found


def _replace(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put `new` wherever `model` has `old`: a tied tensor is in several places."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is old:
                    table[key] = new  # type: ignore[assignment]

"""The architecture that base, experts and the merged network share, run with whichever model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.checkpoint import Checkpoint, TensorSource
from bmm_engine.checkpoint.compose import root_checkpoint
from bmm_engine.errors import CheckpointError, ConfigError
from bmm_engine.merging.align import AlignedExpert, Alignment
from bmm_engine.merging.live_names import live_names
from bmm_engine.merging.plan import MergePlan
from bmm_engine.merging.sources import Models
from bmm_engine.models.architecture import weightless_model
from bmm_engine.models.blocks import block_list, find_blocks
from bmm_engine.models.bounds import Held
from bmm_engine.models.calling import placement

Load = Callable[[str], Tensor]


class Skeleton:
    """`model`: a live base, or its architecture without weights. `names`: base tensor name -> name in the live model.

    What is inside the blocks and what is not can be loaded apart, so that one block of a model at a time is enough.
    """

    def __init__(
        self,
        alignment: Alignment,
        model: nn.Module,
        *,
        blocks: str | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Raises `ConfigError` (which list are the blocks), `CheckpointError` (a tensor that is merged, but has no name in the live model)."""
        self.model, self.dtype, self.device = model, dtype, device
        self.blocks = find_blocks(model, blocks)
        self.names = live_names(alignment, None, model)
        known = set(self.names.values())
        # Of a tied pair the files hold one name; functional calls put it in the place of both.
        tied = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in known}
        self._absent = {n: p for n, p in model.named_parameters() if p.is_meta and n not in known and id(p) not in tied}
        inside = [n for n in self._absent if n.startswith(f"{self.blocks}.")]
        if inside:
            raise CheckpointError(
                f"{alignment.base.label}: its files hold no tensor for {inside[0]!r} of its architecture {type(model).__name__}, so its blocks cannot"
                " be run. Save the base whole (save_pretrained)."
            )

    @classmethod
    def of(cls, models: Models, plan: MergePlan, device: str | None = None) -> Skeleton:
        """That of a plan's base, on the settings' device or another. Raises `ConfigError`, `CheckpointError`."""
        options = plan.settings.sequential
        dtype = options.walk_dtype or (torch.float32 if models.live is None else placement(models.live)[1])
        model = architecture(models.live, plan.alignment, dtype)
        own = torch.device(device or plan.settings.device)
        return cls(plan.alignment, model, blocks=options.blocks, dtype=dtype, device=own)

    @property
    def count(self) -> int:
        """Blocks."""
        return len(block_list(self.model, self.blocks))

    def block(self, index: int) -> nn.Module:
        return block_list(self.model, self.blocks)[index]

    def tensor_names(self, index: int | None) -> list[str]:
        """The base's names of the tensors of block `index`, or of all that stands outside the blocks (None)."""
        return [name for name, live in self.names.items() if self._place(live) == index]

    def live_module(self, module: str) -> str | None:
        """The live name of the linear module that the base's files call `module`, or None."""
        live = self.names.get(f"{module}.weight")
        return None if live is None else live.removesuffix(".weight")

    def place(self, module: str) -> int | None:
        """The number of the block that a module (by its live name) stands in, or None for one outside."""
        return self._place(f"{module}.")

    def load(self, names: Iterable[str], read: Load) -> dict[str, Tensor]:
        """Tensors by their live names, as the walk computes with them."""
        return {self.names[name]: self.ready(read(name)) for name in names}

    def ready(self, tensor: Tensor) -> Tensor:
        """A tensor on the walk's device, and in its dtype if it is a float."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def outside(self, read: Load) -> dict[str, Tensor]:
        """All tensors outside the blocks. Where the files hold none there are NaNs: what depends on those is found out when it is measured."""
        found = self.load(self.tensor_names(None), read)
        for name, parameter in self._absent.items():
            found[name] = torch.full(parameter.shape, torch.nan, dtype=self.dtype, device=self.device)
        return found

    def within(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of block `index` by their names in the block."""
        prefix = f"{self.blocks}.{index}."
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def _place(self, live: str) -> int | None:
        if not live.startswith(f"{self.blocks}."):
            return None
        return int(live.removeprefix(f"{self.blocks}.").split(".", 1)[0])


def architecture(live: nn.Module | None, alignment: Alignment, dtype: torch.dtype) -> nn.Module:
    """What a walk runs: a live base itself, or the architecture that the base's config names. Raises `ConfigError`, `CheckpointError`."""
    if live is not None:
        return live
    root = root_checkpoint(alignment.base)
    if not isinstance(root, Checkpoint) or root.config is None or not Path(root.path).is_dir():
        raise ConfigError(
            f"{alignment.base.label}: a sequential merge runs the model block by block, and this base has no config.json that says how. Give the base"
            " as a checkpoint of transformers, or as a live model."
        )
    # What a view (stacked layers, another vocabulary) says otherwise than the file.
    overrides = {k: v for k, v in (alignment.base.config or {}).items() if v != root.config.get(k)}
    base = alignment.base
    held = Held.of({name: base.spec(name).shape for name in base.names()})
    found = weightless_model(root.path, dtype, held, overrides)
    outputs: Any = getattr(found, "get_output_embeddings", None)
    if outputs is not None and outputs() is not None:
        found.set_output_embeddings(nn.Identity())  # type: ignore[operator]  # logits over a vocabulary are large, and nobody reads them
    return found


def reader_of(alignment: Alignment, expert: AlignedExpert) -> Load:
    """Reads an expert's own tensors by the base's names; what it lacks (kept from the base) is the base's."""
    source: TensorSource = expert.source

    def read(name: str) -> Tensor:
        if name in expert.mapping:
            return expert.load(name)
        own = expert.own_name(name)
        base = alignment.base
        if own is not None and source.spec(own).shape == base.spec(name).shape:
            return source.load(own)
        return base.load(name)

    return read

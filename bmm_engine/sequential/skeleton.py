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
from bmm_engine.models.blocks import Weighted, block_list
from bmm_engine.models.bounds import Held
from bmm_engine.models.building import made_parameter, weightless_model
from bmm_engine.models.calling import placement
from bmm_engine.models.chains import RUN, NoChainError, find_chains, order_chains
from bmm_engine.models.conversion import to_live
from bmm_engine.models.heads import head_parameters

Load = Callable[[str], Tensor]
# A list of blocks, by its live name, and the number of a block in it.
Block = tuple[str, int]


class Skeleton:
    """`model`: a live base, or its architecture without weights. `names`: base tensor name -> name in the live model. `chains`: the lists of blocks
    that hidden states go through, all that the model has until `order` has seen a batch; none: the model is run as a whole.

    What is inside the blocks and what is not can be loaded apart, so that one block of a model at a time is enough. Heads are not run, unless one of
    the modules `wanted` (live names) is in them.
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
        """Raises `ConfigError` (no such list of blocks), `CheckpointError` (a tensor that is merged, but has no name in the live model)."""
        self.model, self.dtype, self.device = model, dtype, device
        self.asked, self.chains = blocks, find_chains(model, blocks)
        base = alignment.base
        specs = {n: base.spec(n) for n in (*alignment.merged, *alignment.kept)}
        # What transformers fuses or splits: a mixture's experts, some queries, keys and values.
        self._conversions = to_live(model, {n: (spec.shape, spec.dtype) for n, spec in specs.items()})
        fused = {name for conversion in self._conversions for name in conversion.inputs}
        self.names = {n: live for n, live in live_names(alignment, None, model, fused).items() if n not in fused}
        made = {name for conversion in self._conversions for name in conversion.outputs}
        known = {*self.names.values(), *made}
        # Of a tied pair the files hold one name; functional calls put it in the place of both.
        tied = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in known}
        self._absent = {n: p for n, p in model.named_parameters() if p.is_meta and n not in known and id(p) not in tied}
        self._heads = head_parameters(model)
        inside = [n for n in self._absent if n not in self._heads and self._block_of(n) is not None]
        if inside:
            raise CheckpointError(
                f"{base.label}: its files hold no tensor for {inside[0]!r} of its architecture {type(model).__name__}, so its blocks cannot"
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

    def order(self, read: Load, batch: Any) -> str | None:
        """Keep of the chains those that hidden states go through, in that order, seen on one batch (on the skeleton's device); why there are none.

        Raises `ConfigError` for blocks that were asked for and are no chain, `CollectionError` for a batch that the model cannot read.
        """
        if not self.chains:
            return f"{type(self.model).__name__} has no list of blocks"
        first = [n for c in self.chains for i in range(RUN) for n in self._names_in((c, i))]
        tensors = {**self.outside(read), **self.load(first, read)}
        try:
            there, self.chains = self.chains, order_chains(Weighted(self.model, tensors), self.chains, batch)
            return None if self.chains else f"a batch reaches none of {', '.join(there)}"
        except NoChainError as error:
            if self.asked is not None:
                raise ConfigError(
                    f"blocks: {self.asked}: {error}; name another list with `blocks`, or leave it out: then the model is walked as a whole."
                ) from error
            self.chains = ()
            return str(error)

    @property
    def blocks(self) -> list[Block]:
        """All blocks, in the order in which hidden states go through them."""
        return [(chain, i) for chain in self.chains for i in range(len(block_list(self.model, chain)))]

    def block(self, block: Block) -> nn.Module:
        chain, index = block
        return block_list(self.model, chain)[index]

    def live_module(self, module: str) -> str | None:
        """The live name of the linear module that the base's files call `module`, or None."""
        live = self.names.get(f"{module}.weight")
        return None if live is None else live.removesuffix(".weight")

    def place(self, module: str) -> Block | None:
        """The block that a module (by its live name) stands in, or None for one outside."""
        return self._block_of(f"{module}.")

    def load(self, names: Iterable[str], read: Load) -> dict[str, Tensor]:
        """Tensors by their live names, as the walk computes with them. Of those that are fused, all are to be among the names, or none."""
        wanted = set(names)
        found = {self.names[name]: self.ready(read(name)) for name in self.names if name in wanted}
        for conversion in self._conversions:
            if wanted.issuperset(conversion.inputs):
                made = conversion.run({name: self.ready(read(name)) for name in conversion.inputs})
                found.update({name: tensor.contiguous() for name, tensor in made.items()})
        return found

    def ready(self, tensor: Tensor) -> Tensor:
        """A tensor on the walk's device, and in its dtype if it is a float."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def outside(self, read: Load, *, heads: bool = False) -> dict[str, Tensor]:
        """All tensors outside the blocks, with the heads' or without. What is left out, or is in no file and no constant, is NaN (and takes no
        memory): what depends on it is found out when it is measured."""
        out = set() if heads else self._heads
        names = [n for n in self._names_in(None) if self.names.get(n) not in out]
        found = self.load(names, read)
        own = dict(self.model.named_parameters(remove_duplicate=False))
        there = {id(own[name]) for name in found if name in own}
        for name in sorted({*self._absent, *out} - set(found)):
            if id(own[name]) in there:  # of a tied pair one stands for both
                continue
            there.add(id(own[name]))
            if name not in out and (made := made_parameter(self.model, name)) is not None:
                found[name] = self.ready(made)
            else:
                nan = torch.full((), torch.nan, dtype=self.dtype, device=self.device)
                found[name] = nan.expand(own[name].shape)
        return found

    def inside(self, block: Block, read: Load) -> dict[str, Tensor]:
        """The tensors of a block by their live names."""
        return self.load(self._names_in(block), read)

    def within(self, block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of tensors by their live names, those of a block by their names in it."""
        prefix = f"{label_of(block)}."
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def _names_in(self, block: Block | None) -> list[str]:
        """The base's names of the tensors of a block, or of all that stands outside the blocks (None)."""
        found = [name for name, live in self.names.items() if self._block_of(live) == block]
        return found + [
            n for c in self._conversions if self._block_of(next(iter(c.outputs))) == block for n in c.inputs
        ]

    def _block_of(self, live: str) -> Block | None:
        chain = next((c for c in self.chains if live.startswith(f"{c}.")), None)
        return None if chain is None else (chain, int(live.removeprefix(f"{chain}.").split(".", 1)[0]))


def label_of(block: Block) -> str:
    return ".".join(map(str, block))


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
    return weightless_model(root.path, dtype, held, overrides)


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

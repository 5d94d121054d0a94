"""What an architecture calls its tensors: the live names, those in files of any version, its buffers, and which names are one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bmm_engine.models.names import leading_parts, modern_name, unwrapped

if TYPE_CHECKING:
    from torch import nn


SPLIT = "(not one tensor there)"
_MOST_HELD = 16  # answers, which are asked for again and again
_SAMPLE = 64  # names that tell what all names have more or less


@dataclass(frozen=True)
class Naming:
    """Of one architecture. `live`: the names of its state dict, in its order; `saved`: live name -> the one that `save_pretrained` writes, where it
    is one tensor there; `buffers`: live names, also of those that no file holds; `ties`: live name -> the name of the tensor that it is;
    `stored`: `live`, as a set; `linear`: names of matrices, and stacks of them, that layers multiply their inputs by."""

    live: tuple[str, ...]
    saved: Mapping[str, str]
    buffers: frozenset[str]
    ties: Mapping[str, str]
    stored: frozenset[str]
    linear: frozenset[str]
    model: nn.Module = field(repr=False, compare=False)
    _rename: Callable[[str], str | None] = field(repr=False, compare=False)
    _all: frozenset[str] = field(repr=False, compare=False)
    _found: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> Naming:
        """Of a live or meta model, by the names that it has without what torch put around it; of transformers' with all that they rename between file
        and model."""
        model, _ = inner_model(model)
        live = tuple(model.state_dict(keep_vars=True))
        buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
        known = frozenset((*live, *buffers))
        return cls(
            live,
            checkpoint_names(model),
            buffers,
            _ties(model),
            frozenset(live),
            _linear(model),
            model,
            _renaming(model, known),
            known,
        )

    def known(self, names: Iterable[str]) -> dict[str, str]:
        """Name in a file -> live name, for those of `names` that are one tensor of the architecture, whatever the layout: as transformers loads them,
        or most of them with some leading parts more or less (what a trainer puts around a model)."""
        key = tuple(names)
        if key not in self._found:
            while len(self._found) >= _MOST_HELD:
                self._found.pop(next(iter(self._found)))
            self._found[key] = self._known(key)
        return dict(self._found[key])

    def _known(self, names: tuple[str, ...]) -> dict[str, str]:
        own = {name: modern_name(name) for name in names}
        found = self._changed(own, lambda name: name, set())
        found |= self._changed(_without(own, found), lambda name: name.replace(".module.", "."), set(found.values()))
        rest = {name: plain for name, plain in _without(own, found).items() if self._rename(plain) is not SPLIT}
        if not rest:
            return found
        taken = set(found.values())
        step = max(1, len(rest) // _SAMPLE)
        sample = dict(list(rest.items())[::step])
        changes = _prefix_changes(rest.values(), self._all - taken)
        best = max(changes, key=lambda change: len(self._changed(sample, change, set(taken))))
        more = self._changed(rest, best, taken)
        return found | more if 2 * len(more) >= len(own) else found

    def loadable(self, names: Iterable[str]) -> dict[str, str]:
        """Name in a file -> one that `from_pretrained` finds, for those that it would not find as they are."""
        names = tuple(names)
        known = self.known(names)
        found = {
            n: self.saved.get(live, live)
            for n, live in known.items()
            if self._rename(n) is None and live in self.stored
        }
        found |= {n: plain for n in names if n not in known and (plain := unwrapped(n)) != n}
        return found if len({*names} - {*found} | {*found.values()}) == len(names) else {}

    def _changed(
        self, names: Mapping[str, str], change: Callable[[str], str | None], taken: set[str]
    ) -> dict[str, str]:
        """Those that the change makes a name of the architecture which no other has."""
        found: dict[str, str] = {}
        for name, plain in names.items():
            changed = change(plain)
            live = None if changed is None else self._rename(changed)
            if live is not None and live is not SPLIT and live not in taken:
                taken.add(live)
                found[name] = live
        return found


def _without(names: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    return {name: plain for name, plain in names.items() if name not in found}


def checkpoint_names(model: nn.Module) -> dict[str, str]:
    """Live parameter name -> the name that `save_pretrained` gives it.

    transformers 5 renames some tensors between file and model (ViT: `encoder.layer.0...query` is `layers.0...q_proj` live).
    A tensor that is split or fused on its way to the file has no single name there and is left out.
    """
    import torch

    inner, prefix = inner_model(model)
    if prefix:  # compiled, or run in parallel
        return {f"{prefix}{live}": saved for live, saved in checkpoint_names(inner).items()}
    live = model.state_dict(keep_vars=True)
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # no transformers, or version 4, whose live names are the names in the file
        return {name: name for name in live}
    if not isinstance(model, PreTrainedModel):
        return {name: name for name in live}
    # Tensors pass through by identity where they are only renamed; each name has one of its own, tied or not.
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in live.items()}
    owner = {id(tensor): name for name, tensor in stand_ins.items()}
    return {
        owner[id(tensor)]: saved
        for saved, tensor in revert_weight_conversion(model, dict(stand_ins)).items()
        if id(tensor) in owner
    }


def inner_model(model: nn.Module) -> tuple[nn.Module, str]:
    """The model that torch has wrapped as a whole, and the part of its names that stands for that; the model itself and ""."""
    for part in ("_orig_mod", "module"):
        inner = model._modules.get(part)
        if inner is not None and len(model._modules) == 1 and not model._parameters:
            return inner, f"{part}."
    return model, ""


def _prefix_changes(names: Iterable[str], known: Iterable[str]) -> Iterator[Callable[[str], str | None]]:
    """Leading parts taken from the names, or put before them, as `known` names have them."""
    for prefix in leading_parts(names):
        yield lambda name, prefix=prefix: name.removeprefix(prefix) if name.startswith(prefix) else None  # type: ignore[misc]
    for prefix in leading_parts(known):
        yield lambda name, prefix=prefix: prefix + name  # type: ignore[misc]


def _renaming(model: nn.Module, known: frozenset[str]) -> Callable[[str], str | None]:
    """Name in a file -> live name, as transformers' loading has it; SPLIT for what it splits, fuses or turns, None for what it does not know."""
    plain: Callable[[str], str | None] = lambda name: name if name in known else None  # noqa: E731
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        if not isinstance(model, PreTrainedModel):
            return plain
        conversions = get_model_conversion_mapping(model)
    except ImportError:  # no transformers, or version 4
        return plain
    renamings: Any = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters: Any = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix, names = model.base_model_prefix, dict.fromkeys(known, True)

    def rename(name: str) -> str | None:
        renamed, converter = rename_source_key(name, renamings, converters, prefix, names)
        if renamed in known:
            return renamed if converter is None else SPLIT
        if name not in known:
            name, _ = rename_source_key(name, [], [], prefix, names)
        return name if name in known else None

    return rename


def _linear(model: nn.Module) -> frozenset[str]:
    from torch import nn

    found = set()
    for prefix, module in model.named_modules():
        kind = type(module).__name__
        plain = isinstance(module, nn.Linear) or kind == "Conv1D"
        for name, parameter in module.named_parameters(prefix, recurse=False):
            stacked = parameter.ndim == 3 and min(parameter.shape) > 1 and "Conv" not in kind
            if stacked or (plain and parameter.ndim == 2):
                found.add(name)
    return frozenset(found)


def _ties(model: nn.Module) -> dict[str, str]:
    """Live name -> the first name of the same parameter, or the one that transformers ties it to."""
    said: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    found = {}
    for names in groups.values():
        holder = next((name for name in names if name in said.values()), names[0])
        found.update({name: holder for name in names if name != holder})
    return found

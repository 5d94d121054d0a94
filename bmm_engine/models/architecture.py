"""Which tensors are linear modules: read off a live model, or off a checkpoint's config without loading a weight."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm_engine.errors import ConfigError
from bmm_engine.models.bounds import Held
from bmm_engine.models.building import meta_model
from bmm_engine.models.naming import Naming, checkpoint_names, inner_model
from bmm_engine.progress import quiet_transformers

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LinearModule:
    """One linear module: `y = x W^T + b`, `W` of shape (out, in)."""

    name: str
    out_features: int
    in_features: int
    transposed: bool = False  # GPT-2's Conv1D stores (in, out)
    has_bias: bool = True

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"

    @property
    def stored_shape(self) -> tuple[int, int]:
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D, told by its form, so that transformers need not be imported to ask."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def linear_module(name: str, module: nn.Module) -> LinearModule | None:
    """Describe `module` if it is an `nn.Linear` or a Conv1D, else None."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return LinearModule(name, module.out_features, module.in_features, False, module.bias is not None)
    if is_conv1d(module):
        weight = module.get_parameter("weight")
        return LinearModule(name, weight.shape[1], weight.shape[0], True, getattr(module, "bias", None) is not None)
    return None


# Classes whose output is their task's own: what they have beside the parts of a body is a head.
_TASKS = re.compile(r"Classification$|QuestionAnswering$|MultipleChoice$|NextSentencePrediction$|For(CTC|XVector)$")
_BARE = re.compile(r"(?<!LMHead)(?<!DoubleHeads)(?<!MT)Model$")
# Parts of a model that are models with a head themselves: an encoder-decoder's decoder.
_HEADED = re.compile(r"For[A-Z]|LMHead|HeadModel")
_HEADS = re.compile(r"(\w+_)?(heads?|classifiers?|classification|score|outputs|logits|predictors?)")


def is_head(name: str, model: nn.Module) -> bool:
    """Is the module called `name` a task head?

    In a transformers model, and in one that is a part of it: all that stands outside `base_model`, and the output embeddings. A model of a task that
    has no `base_model` within (CLIP's classifier stands beside its `vision_model`): what is a linear module, or called a head, beside its parts.
    """
    owner, path = model, name
    while path:
        if _is_own_head(path, owner):
            return True
        step, _, path = path.partition(".")
        owner = getattr(owner, step)
        while path and not (hasattr(owner, "base_model_prefix") and _HEADED.search(type(owner).__name__)):
            step, _, path = path.partition(".")
            owner = getattr(owner, step)
    return False


def is_bare(model: nn.Module) -> bool:
    """Is it a body without a head? Some call a part of theirs as models with heads call the body (DINOv3's encoder)."""
    return _BARE.search(type(model).__name__) is not None


def _is_own_head(name: str, model: nn.Module) -> bool:
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        if not is_bare(model) and name != prefix and not name.startswith(prefix + "."):
            return True
    elif prefix and _TASKS.search(type(model).__name__):
        child = name.split(".")[0]
        if linear_module(child, getattr(model, child)) is not None or _HEADS.fullmatch(child):
            return True
    if name.startswith("perceiver.decoder.") and _TASKS.search(type(model).__name__):
        return True  # of the task, although the body calls it
    get_outputs: Any = getattr(model, "get_output_embeddings", None)
    try:
        outputs = get_outputs() if get_outputs is not None else None
    except (NotImplementedError, AttributeError):  # some have none, and say so in this way
        outputs = None
    if outputs is None:
        return False
    module = model.get_submodule(name)
    return module is outputs or any(module is one for one in getattr(outputs, "children", tuple)())


def linear_modules(model: nn.Module, patterns: Iterable[str] | None = None) -> dict[str, LinearModule]:
    """The linear modules of a live (or meta) model, by their names in the model, in its order.

    Without `patterns`, all but the heads; with them, exactly those whose name, live or in the checkpoint, matches one (shell patterns;
    heads too). Raises `ConfigError` for a pattern that matches nothing.
    """
    found = {}
    inner, wrapped = inner_model(model)
    for name, module in inner.named_modules():
        described = linear_module(f"{wrapped}{name}", module)
        if described is not None and (patterns is not None or not is_head(name, inner)):
            found[described.name] = described
    return found if patterns is None else select_modules(found, patterns, module_checkpoint_names(model, found))


def nothing_to_solve(model: nn.Module | str) -> str:
    """Why a model, or one of that class, has nothing that could be measured and solved, and what to do."""
    name = model if isinstance(model, str) else type(model).__name__
    return (
        f"{name} has no linear modules (nn.Linear, Conv1D) beside its heads, so no calibration can be used and nothing is solved. Name a head with"
        " `modules`, or say `alpha: inf`: then all tensors are merged by the anchor's rule."
    )


def select_modules(
    found: Mapping[str, LinearModule], patterns: Iterable[str] | None, *aliases: Mapping[str, str]
) -> dict[str, LinearModule]:
    """Those of `found` whose name, or an alias, matches one of `patterns` (all for None).

    Raises `ConfigError` for a pattern without a match.
    """
    if patterns is None:
        return dict(found)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = {name: (name, *(own.get(name, name) for own in aliases)) for name in found}
    matches = {p: [n for n, known in names.items() if any(fnmatchcase(k, p) for k in known)] for p in patterns}
    for pattern, matched in matches.items():
        if not matched:
            sample = ", ".join(list(found)[:3])
            raise ConfigError(
                f"modules: the pattern {pattern!r} matches no linear module; there are {len(found)}, such as {sample}."
                " Patterns are shell patterns over module names, for example '*attention*'."
            )
    chosen = {name for matched in matches.values() for name in matched}
    return {name: module for name, module in found.items() if name in chosen}


def module_checkpoint_names(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """Live module name -> its name in the checkpoint, for the linear modules that have one."""
    names = checkpoint_names(model)
    saved = {}
    for module in modules:
        weight = names.get(f"{module}.weight", "")
        if weight.endswith(".weight"):
            saved[module] = weight[: -len(".weight")]
    return saved


def weight_patterns(stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Patterns that match the modules of all 2-D weights in numbered blocks, or their names where no block has a number."""
    modules = [
        name.removesuffix(".weight") for name, shape in stored.items() if name.endswith(".weight") and len(shape) == 2
    ]
    blocks = {found[1]: None for name in modules if (found := re.match(r"(.*?(?:^|\.))\d+\.", name))}
    return [f"{block}*" for block in blocks] or modules


def ties_by_default(config: Mapping[str, Any]) -> bool:
    """Does the architecture tie embeddings and head where a config does not say? False where it says, and where transformers does not know it."""
    if "tie_word_embeddings" in config:
        return False
    try:
        from transformers import CONFIG_MAPPING

        return bool(CONFIG_MAPPING[config["model_type"]]().tie_word_embeddings)
    except Exception:  # no transformers, no such architecture, or one whose config has no defaults
        return False


_namings: dict[str, Naming] = {}  # by what the config says: building the architecture takes a while
_MOST_NAMINGS = 32


def naming_of(path: Path, held: Held, overrides: Mapping[str, Any] | None = None) -> Naming:
    """What the architecture of the checkpoint directory `path` calls its tensors. Raises `CheckpointError` as `meta_model` does."""
    try:
        key = (path / "config.json").read_text(encoding="utf-8") + json.dumps(
            overrides or {}, sort_keys=True, default=repr
        )
    except (OSError, ValueError):
        key = ""
    if key and key in _namings:
        return _namings[key]
    with quiet_transformers():
        found = Naming.of(meta_model(path, held, overrides))
    if key:
        while len(_namings) >= _MOST_NAMINGS:
            _namings.pop(next(iter(_namings)))
        _namings[key] = found
    return found


def stored_layout(path: Path, stored: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], list[str]]:
    """Of the checkpoint at `path`, whose files hold `stored` (name -> shape): live parameter name, and the name that this version of transformers
    would save it under, -> its name in the files; and the weights stored as (in, out).

    Raises `CheckpointError` for an architecture that transformers does not know.
    """
    model = meta_model(path, Held.of(stored))
    naming = Naming.of(model)
    files = {live: file for file, live in naming.known(stored).items()}
    names = {saved: files.get(live, saved) for live, saved in naming.saved.items()}
    names |= {live: files.get(live, saved) for live, saved in naming.saved.items()}
    flipped = [m.weight for m in linear_modules(model, ["*"]).values() if m.transposed]
    return names, [names.get(weight, weight) for weight in flipped]


def checkpoint_linear_modules(
    path: Path,
    stored: Mapping[str, tuple[int, ...]],
    patterns: Iterable[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    held: Held | None = None,
) -> dict[str, LinearModule]:
    """The linear modules of the checkpoint at `path`, by the names that its files use; `patterns` as in `linear_modules`.

    `stored`: name -> shape of each tensor in the files, in whatever layout: with the base model's prefix or without, under live names, or those
    of an older version. Modules that the files do not hold under one name are left out. `overrides`: keys of the config that differ from the
    file's. `held`: what the files hold in all, where `stored` is a part of it.

    Raises `CheckpointError` for an architecture that transformers does not know, `ConfigError` for a pattern without a match.
    """
    model = meta_model(path, held or Held.of(stored), overrides)
    found = linear_modules(model, None if patterns is None else ["*"])
    naming = Naming.of(model)
    files = {live: file for file, live in naming.known(stored).items()}
    by_file, live_names, saved_names = {}, {}, {}
    for live, module in found.items():
        name, ending, rest = files.get(module.weight, "").rpartition(".weight")
        if ending and not rest:
            by_file[name] = replace(module, name=name)
            live_names[name] = live
            saved_names[name] = naming.saved.get(module.weight, module.weight).removesuffix(".weight")
    return select_modules(by_file, patterns, live_names, saved_names)


def matrix_modules(stored: Mapping[str, tuple[int, ...]], patterns: Iterable[str]) -> dict[str, LinearModule]:
    """For state dicts and unknown architectures: each 2-D `NAME.weight` whose NAME matches a pattern, taken as (out, in)."""
    found = {}
    for name, shape in stored.items():
        if name.endswith(".weight") and len(shape) == 2:
            module = name[: -len(".weight")]
            found[module] = LinearModule(module, shape[0], shape[1], False, f"{module}.bias" in stored)
    return select_modules(found, patterns)

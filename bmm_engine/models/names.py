"""How the name of one tensor is written: wrappers around a model or module, old LayerNorm and weight-norm names."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What torch puts into names when it wraps a model or one of its modules: compiled, sharded, checkpointed, averaged.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# What transformers itself renames when it loads old files.
_LEGACY = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
    (re.compile(r"(^|\.)weight_g$"), r"\1parametrizations.weight.original0"),
    (re.compile(r"(^|\.)weight_v$"), r"\1parametrizations.weight.original1"),
)
MOST_PARTS = 3  # so many leading parts of a name may be too much, or too few


def unwrapped(name: str) -> str:
    """Without the wrappers `_orig_mod.` and the like, wherever they stand."""
    return _WRAPPERS.sub("", name)


def modern_name(name: str) -> str:
    """Without wrappers, legacy LayerNorm names and those of an older weight norm."""
    name = unwrapped(name)
    for pattern, replacement in _LEGACY:
        name = pattern.sub(replacement, name)
    return name


def leading_parts(names: Iterable[str]) -> list[str]:
    """The first part of names, the first two, the first three, each with its dot, up to a number; the shorter ones first."""
    found = set()
    for name in names:
        parts = name.split(".")[:-1][:MOST_PARTS]
        for count, part in enumerate(parts, 1):
            if part.isdigit() and count > 1:
                break
            found.add(".".join(parts[:count]) + ".")
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))

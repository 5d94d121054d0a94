"""How the name of one tensor is written: wrappers around a model or module, old LayerNorm and weight-norm names."""

from __future__ import annotations

import re

# What torch puts into names when it wraps a model or one of its modules: compiled, sharded, checkpointed, averaged.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# What transformers itself renames when it loads old files.
_LEGACY = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
    (re.compile(r"(^|\.)weight_g$"), r"\1parametrizations.weight.original0"),
    (re.compile(r"(^|\.)weight_v$"), r"\1parametrizations.weight.original1"),
)


def unwrapped(name: str) -> str:
    """Without the wrappers `_orig_mod.` and the like, wherever they stand."""
    return _WRAPPERS.sub("", name)


def modern_name(name: str) -> str:
    """Without wrappers, legacy LayerNorm names and those of an older weight norm."""
    name = unwrapped(name)
    for pattern, replacement in _LEGACY:
        name = pattern.sub(replacement, name)
    return name

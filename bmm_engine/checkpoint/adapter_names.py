"""The names in a PEFT adapter's file, and the base's tensors that they mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from bmm_engine.checkpoint.adapter_config import MERGE_REMEDY
from bmm_engine.checkpoint.names import change_prefix, prefix_changes
from bmm_engine.checkpoint.source import TensorSource
from bmm_engine.errors import CheckpointError
from bmm_engine.models.names import modern_name

_PREFIX = "base_model.model."
# `MODULE.lora_A.weight`, as PEFT writes it, or with the adapter's name in it: `MODULE.lora_A.NAME.weight`.
_PARTS = (
    re.compile(r"(?P<module>.+)\.(?P<part>lora_A)(?:\.[^.]+)?\.weight"),
    re.compile(r"(?P<module>.+)\.(?P<part>lora_B)(?:\.[^.]+)?\.weight"),
    re.compile(r"(?P<module>.+)\.(?P<part>lora_B)(?:\.[^.]+)?\.(?P<bias>bias)"),
    re.compile(r"(?P<module>.+)\.(?P<part>lora_embedding_[AB])(?:\.[^.]+)?"),
    re.compile(r"(?P<module>.+)\.(?P<part>lora_magnitude_vector)(?:\.[^.]+){0,2}"),
)
# With `bias: all` PEFT also writes the biases of a trained module's wrapper; the module itself stands in the file under its own name.
_WRAPPED = re.compile(r"(?P<module>.+?)\.(modules_to_save|original_module)\..+")
_UNKNOWN = re.compile(r"(^|\.)(lora_|token_adapter\.|modules_to_save\.|original_module\.)")


def sort_keys(keys: Iterable[str], label: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """`(parts, saved)`: module -> {"lora_A", "lora_B", "lora_B.bias", "lora_embedding_A", ...: key}; name of a whole tensor -> key.

    Raises CheckpointError for tensors of another method and for two adapters in one file.
    """
    parts: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    names = {key: key.removeprefix(_PREFIX) for key in keys}
    for key, name in names.items():
        wrapped = _WRAPPED.fullmatch(name)
        if wrapped is not None and any(
            n.startswith(f"{wrapped['module']}.") and not _UNKNOWN.search(n) for n in names.values()
        ):
            continue
        match = next(filter(None, (pattern.fullmatch(name) for pattern in _PARTS)), None)
        if match is not None:
            part = f"{match['part']}.bias" if match.groupdict().get("bias") else match["part"]
            first = parts.setdefault(match["module"], {}).setdefault(part, key)
        elif _UNKNOWN.search(name):
            raise CheckpointError(f"{label}: tensor {key!r} is not part of a plain LoRA adapter; {MERGE_REMEDY}")
        else:
            # The adapted module itself stands under `base_layer` in the live model.
            first = saved.setdefault(re.sub(r"\.base_layer\.([^.]+)$", r".\1", name), key)
        if first != key:
            raise CheckpointError(
                f"{label}: {first!r} and {key!r} are the same part of one module; save each adapter to a directory of its"
                " own"
            )
    return parts, saved


def known_names(base: TensorSource, live_names: Mapping[str, str]) -> dict[str, str]:
    """Every name under which an adapter may mean a tensor of the base -> the base's name."""
    names = (*base.names(), *base.aliases)
    own = {name: name for name in names} | {modern_name(name): name for name in names}
    files = match_names(set(live_names.values()), own)
    return {live: files[file] for live, file in live_names.items() if file in files} | own


def match_names(wanted: Collection[str], known: Mapping[str, str]) -> dict[str, str]:
    """Wanted name -> the base's, for those that are found under the one change of prefix that finds most."""
    best: dict[str, str] = {}
    for prefix in prefix_changes(wanted, known):
        # What already agrees (a head beside a prefixed body) keeps its name.
        pairs = {name: known.get(change_prefix(prefix, name), known.get(name)) for name in wanted}
        found = {name: target for name, target in pairs.items() if target is not None}
        if len(found) > len(best):
            best = found
    return best

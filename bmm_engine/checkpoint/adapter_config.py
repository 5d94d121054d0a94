"""`adapter_config.json`: what it takes to apply a LoRA adapter, and a refusal of what cannot be applied exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from bmm_engine.checkpoint.guard import read_json_object
from bmm_engine.checkpoint.layout import contained
from bmm_engine.checkpoint.validated import validated
from bmm_engine.errors import CheckpointError, cut, shown

CONFIG_FILENAME = "adapter_config.json"
MERGE_REMEDY = "merge it into its base with PEFT (merge_and_unload, save_pretrained) and pass the result"

# Options under which the trained model is not `W + scaling B A`, and why.
_REFUSED = {
    "alora_invocation_tokens": "is active on some tokens only",
    "arrow_config": "routes between adapters token by token",
    "enable_lora": "covers parts of a fused matrix",
    "kasa_config": "cuts singular values off the base's weights",
    "layer_replication": "repeats layers of the base",
    "megatron_config": "belongs to a model split by Megatron",
    "monteclora_config": "samples its weights",
    "target_parameters": "adapts bare parameters (of a mixture of experts), stored in PEFT's own order",
    "trainable_token_indices": "retrains single rows of the embedding",
    "use_bdlora": "has block-diagonal factors",
    "use_qalora": "pools its inputs",
    "velora_config": "keeps tensors of its own",
}
# Initialisations that move a part of the base's weight into the adapter; PEFT's `path_initial_model_for_weight_conversion`
# writes such an adapter as a plain one.
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# Beyond these no rank and no scaling was ever trained.
_MOST_RANK = 2**16
_MOST_ALPHA = 1e6


class AdapterConfig(BaseModel):
    """The keys of `adapter_config.json` that are known, with their types: text is no number. PEFT adds keys; those are let pass. A switch that is
    null is off: PEFT keeps the null, and asks of it only whether it is true."""

    model_config = ConfigDict(strict=True, extra="allow")

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    inference_mode: bool | None = None
    # Their own checks name the element that is wrong.
    r: Any = 8
    lora_alpha: Any = 8
    rank_pattern: Any = None
    alpha_pattern: Any = None
    modules_to_save: Any = None
    lora_dropout: float | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    lora_bias: bool | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    init_lora_weights: bool | str | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    use_qalora: bool | None = None


@dataclass(frozen=True)
class LoraSettings:
    """The options of a LoRA adapter that decide its weights. Patterns are regular expressions, in the order of the file."""

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool
    fan_in_fan_out: bool
    dora: bool
    modules_to_save: tuple[str, ...]
    trained_on: str | None
    revision: str | None = None

    @classmethod
    def read(cls, directory: Path) -> LoraSettings:
        """Parse and check `adapter_config.json`. Raises CheckpointError that names the key and the remedy."""
        path = contained(directory, CONFIG_FILENAME, asked_by="the directory")
        raw = read_json_object(path)
        _refuse_other_kinds(path, raw)
        config = validated(
            AdapterConfig, raw, path, "Correct it, or save the adapter again with PEFT's save_pretrained."
        )
        _refuse(path, raw)
        modules_to_save = () if config.modules_to_save is None else config.modules_to_save
        if not isinstance(modules_to_save, (list, tuple)) or not all(isinstance(m, str) for m in modules_to_save):
            raise CheckpointError(f"{path}: modules_to_save={shown(modules_to_save)} is no list of names; correct it")
        return cls(
            path=path,
            rank=_positive(path, "r", config.r, _MOST_RANK, whole=True),
            alpha=_positive(path, "lora_alpha", config.lora_alpha, _MOST_ALPHA),
            rank_pattern=_patterns(path, "rank_pattern", config.rank_pattern, _MOST_RANK, whole=True),
            alpha_pattern=_patterns(path, "alpha_pattern", config.alpha_pattern, _MOST_ALPHA),
            rank_stabilized=bool(config.use_rslora),
            fan_in_fan_out=bool(config.fan_in_fan_out),
            dora=bool(config.use_dora),
            modules_to_save=tuple(modules_to_save),
            trained_on=config.base_model_name_or_path or None,
            revision=config.revision or None,
        )

    def rank_of(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.rank)

    def scaling(self, module: str) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` (rsLoRA, arXiv 2312.03732)."""
        rank = self.rank_of(module)
        return _first_match(self.alpha_pattern, module, self.alpha) / (
            math.sqrt(rank) if self.rank_stabilized else rank
        )

    def saves(self, name: str) -> bool:
        """Is the tensor `name` part of one of `modules_to_save`?"""
        return any(f"{module}." in name for module in self.modules_to_save)


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the whole of `module` from one of its dots on, which is PEFT's rule."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _refuse_other_kinds(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise CheckpointError(f"{path}: peft_type is {shown(kind)}; only LORA can be applied here: {MERGE_REMEDY}")


def _refuse(path: Path, config: Mapping[str, Any]) -> None:
    for option, reason in _REFUSED.items():
        if config.get(option):
            raise CheckpointError(
                f"{path}: with {option}={shown(config[option])} the adapter {reason}, so it is no plain LoRA: {MERGE_REMEDY}"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_THE_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights={start!r} changed the base's weights before training, so the adapter does not fit"
            " the base as it is: save it again with PEFT's `path_initial_model_for_weight_conversion`, or "
            f"{MERGE_REMEDY}"
        )


def _positive(path: Path, key: str, value: Any, most: float, *, whole: bool = False) -> Any:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise CheckpointError(
            f"{path}: {cut(key, 80)}={shown(value)} is no positive {'integer' if whole else 'number'}; correct it or download it again"
        )
    if value > most:
        raise CheckpointError(
            f"{path}: {cut(key, 80)}={shown(value)} is more than {most:.0f}, the most that makes sense; correct it or download it again"
        )
    return value


def _patterns(path: Path, key: str, given: Any, most: float, *, whole: bool = False) -> dict[str, Any]:
    patterns = {} if given is None else given
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {key}={shown(patterns)} is no map from module names to numbers; correct it")
    for pattern, value in patterns.items():
        _positive(path, f"{key}[{pattern!r}]", value, most, whole=whole)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: {key}: {shown(pattern)} is no regular expression ({error}); correct it"
            ) from None
    return dict(patterns)

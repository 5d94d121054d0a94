"""Checkpoints whose weights are packed or scaled integers: they cannot be merged, and are told by their config, names and dtypes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bmm_engine.checkpoint.source import TensorSource
from bmm_engine.errors import CheckpointError, shown

# Names that only a quantised checkpoint has -> the format that writes them.
_PARTS = (
    (r"qweight|qzeros|g_idx", "GPTQ or AWQ"),
    (r"(nested_)?absmax|(nested_)?quant_map|quant_state(\..+)?|SCB", "bitsandbytes"),
    (r"\w*_scale_inv", "FP8 with block scales"),
    (r"weight_(packed|zero_point)", "compressed-tensors"),
    (r"W_q", "HQQ"),
    (r"weight\.(_data|_scale|_shift)", "quanto"),
    (r"(.+:)?(_weight_)?qdata", "torchao"),
)
_PATTERNS = tuple((re.compile(rf"(^|[.:])({part})$"), method) for part, method in _PARTS)
_SCALE = re.compile(r"(^|\.)weight_scale$")
_PACKED = re.compile(r"(_proj|_blocks|_packed|codes)$")
_CALLED = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "finegrained_fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
}
_REMEDY = (
    "Merge the original floating-point weights, or dequantise it first (transformers: model.dequantize(), then save_pretrained) and pass what that"
    " writes."
)


def refuse_quantised(source: TensorSource, *, integers: bool = True) -> None:
    """Raise `CheckpointError`, naming format, tensor and remedy, for a model whose weights are quantised. `integers`: also where all that shows it is
    that a weight holds integers."""
    said = _said(source.config)
    for name in source.names():
        spec = source.spec(name)
        method = next((method for pattern, method in _PATTERNS if pattern.search(name)), None)
        if method is None and spec.dtype.is_floating_point and spec.dtype.itemsize < 2:
            method = "FP8"
        if method is None and not spec.dtype.is_floating_point and len(spec.shape) > 1:
            method = "integer weights" if _PACKED.search(name) or (integers and name.endswith("weight")) else None
        if method is None and _SCALE.search(name) and (weight := name.removesuffix("_scale")) in source:
            dtype = source.spec(weight).dtype
            method = None if dtype.itemsize > 1 else "FP8" if dtype.is_floating_point else "scaled integers"
        if method is not None:
            raise CheckpointError(
                f"{source.label}: is quantised ({_name(said) or method}): {name!r} is a weight, or part of one, that is stored packed or scaled"
                f" ({spec.dtype}, shape {spec.shape}), and such weights cannot be merged. {_REMEDY}"
            )
    if said is not None:
        raise CheckpointError(
            f"{source.label}: its config has a quantization_config ({_name(said)}), while its tensors are floating-point: whoever loads it would"
            " quantise them, or take them for quantised. If they are the original or dequantised weights, take quantization_config out of its"
            " config.json; if not, merge the original floating-point weights."
        )


def _said(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The `quantization_config` of a config, or of a section of it."""
    for part in (config, *(config or {}).values()):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(found, Mapping) and found:
            return found
    return None


def _name(said: Mapping[str, Any] | None) -> str:
    method = None if said is None else said.get("quant_method")
    if method is None and said is not None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        method = "bitsandbytes"
    return (
        "" if said is None else _CALLED.get(str(method), "an unnamed method" if method is None else shown(method)[:60])
    )

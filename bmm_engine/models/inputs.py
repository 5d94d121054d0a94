"""Do a model's inputs fit it? Names, token numbers, lengths and masks, checked before it runs: out of range, it would end in the middle of itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.errors import ConfigError

# Tables that are read by position, and parts of names of those that are read by places in a picture.
_POSITIONS = ("*position_embeddings", "*position_embedding", "*embed_positions", "*wpe", "*positions_embed")
_OF_PICTURES = ("vision", "visual", "image", "patch", "pixel")
_WHOLE = (torch.int64, torch.int32)


def check_inputs(model: nn.Module, batch: Any, where: str, *, ready: bool) -> None:
    """Raise `ConfigError` that begins with `where` unless the model can read the batch. The model may be on the meta device.

    `ready`: the inputs were given as they are, not made by a tokenizer: then their names and masks are checked too.
    """
    if not isinstance(batch, Mapping):
        return
    if ready:
        _check_names(model, batch, where)
        _check_mask(batch, where)
    for name, table in _tables(model):
        if isinstance(ids := batch.get(name), Tensor):
            _check_ids(name, ids, table, model, where)
    ids = batch.get("input_ids")
    limit = _positions(model)
    if isinstance(ids, Tensor) and ids.dim() == 2 and limit is not None and ids.shape[1] > limit:
        raise ConfigError(
            f"{where}: a sample has {ids.shape[1]} tokens, {type(model).__name__} has {limit} positions. "
            + (
                "Cut the inputs."
                if ready
                else f"Cut them with `max_length: {limit}` in `calibration`, or `--max-length {limit}`."
            )
        )


def _check_names(model: nn.Module, batch: Mapping[str, Any], where: str) -> None:
    parameters = inspect.signature(model.forward).parameters.values()
    known = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and (p.annotation is p.empty or _takes_tensors(str(p.annotation)))
    ]
    for name in batch:
        if name not in known:
            raise ConfigError(
                f"{where}: {type(model).__name__} has no input called {str(name)[:100]!r}; it takes {', '.join(known)}. Rename the tensor, or"
                " leave it out."
            )
    main = str(getattr(model, "main_input_name", ""))
    if main in known and not {main, "inputs_embeds"} & set(batch):
        raise ConfigError(
            f"{where}: holds {', '.join(batch)}, and not the {main!r} that {type(model).__name__} reads. Add it."
        )


def _takes_tensors(annotation: str) -> bool:
    """Not a switch or a number, which some let be a tensor too (`logits_to_keep: int | torch.Tensor`)."""
    return "Tensor" in annotation and re.search(r"\b(int|bool)\b", annotation) is None


def _check_mask(batch: Mapping[str, Any], where: str) -> None:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    if isinstance(ids, Tensor) and ids.shape[:2] != mask.shape:
        raise ConfigError(
            f"{where}: attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; they must agree."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ConfigError(
            f"{where}: attention_mask holds values between {mask.min()} and {mask.max()}; give 0 for padding, 1 for the rest."
        )


def _check_ids(name: str, ids: Tensor, table: nn.Embedding, model: nn.Module, where: str) -> None:
    if ids.dtype not in _WHOLE:
        raise ConfigError(f"{where}: {name} is of {ids.dtype}; give whole numbers (int64).")
    if ids.dim() < 2 or not ids.numel():
        raise ConfigError(
            f"{where}: {name} has shape {tuple(ids.shape)}; (samples, tokens) is expected, and at least one of each."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= table.num_embeddings:
        raise ConfigError(
            f"{where}: {name} has numbers between {low} and {high}, {type(model).__name__} has an embedding for 0 to"
            f" {table.num_embeddings - 1}. Make the inputs with the tokenizer of this model."
        )


def _tables(model: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    """Names of inputs that are numbers of rows, and the tables that they are looked up in."""
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if get is not None else None
    except NotImplementedError:  # several inputs, none of them the one
        embedding = None
    if isinstance(embedding, nn.Embedding):
        yield "input_ids", embedding
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.endswith("token_type_embeddings"):
            yield "token_type_ids", module


def _positions(model: nn.Module) -> int | None:
    """The most tokens that a table of positions has a row for; None without one (rotary, relative)."""
    limits = [
        module.num_embeddings - _first_row(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and any(fnmatchcase(path, pattern) for pattern in _POSITIONS)
        and not any(part in path for part in _OF_PICTURES)
    ]
    return max(limits, default=None)


def _first_row(table: nn.Embedding) -> int:
    """Where the first token's position lies: RoBERTa counts from behind the padding's row, BART and OPT from 2."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1

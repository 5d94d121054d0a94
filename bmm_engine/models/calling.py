"""Calling a model on a batch: where it lies, its padding mask, which rows of an input are no padding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.errors import BmmError, CollectionError, ConfigError, EmptyCalibrationError

logger = logging.getLogger(__name__)

Mask = str | Callable[[Any], Tensor | None] | None


class Stop(Exception):
    """Ends a forward pass that has come far enough."""


class BodyEnd(Stop):
    """Ends a forward pass before the heads, which nobody reads."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module's training flag is as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first floating-point parameter. Raises `ConfigError` without one."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        raise ConfigError(f"{type(model).__name__} has no floating-point parameters.")
    return first.device, first.dtype


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch (tensor, mapping or sequence, nested) moved to `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(to_device(value, device) for value in batch)
    return batch


def samples_of(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of its first tensor. Raises `CollectionError` where it has none."""
    size = next((len(leaf) for leaf in _leaves(batch) if leaf.dim()), None)
    if size is None:
        raise CollectionError("A calibration batch holds no tensor whose first dimension could be the samples.")
    return size


def _leaves(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _leaves(part)


def mask_of(batch: Any, mask: Mask) -> Tensor | None:
    """The padding mask of a batch, or None. Raises `EmptyCalibrationError` where it hides everything."""
    found = (
        mask(batch)
        if callable(mask)
        else batch.get(mask)
        if isinstance(mask, str) and isinstance(batch, Mapping)
        else None
    )
    if found is not None and not bool((found != 0).any()):
        raise EmptyCalibrationError(
            "A calibration batch is all padding (its mask is 0 everywhere). Check the mask and the texts."
        )
    return found


@dataclass(frozen=True)
class Padding:
    """Which rows of a module's input are padding. `masks`, each (samples, length), 0 for padding: of the inputs, and of a decoder's.

    `of_features`: the mask of features (samples, their length) that a model makes of its inputs, from that length and a mask, where the model tells.
    `strict`: rows that no mask fits are an error; else they all count, since they are of something else (positions, a picture, pooled states).
    """

    masks: tuple[Tensor, ...]
    of_features: Callable[[int, Tensor], Tensor] | None = None
    strict: bool = False

    def rows(self, name: str, x: Tensor) -> Tensor | None:
        """Which rows of the input `x` (..., in) of module `name` count, leading dimensions flattened; None for all. Raises `CollectionError`."""
        shape = x.shape[:-1]
        for mask in self.masks:
            if shape == mask.shape:
                return mask.reshape(-1) != 0
        for mask in self.masks:
            if shape == mask.shape[::-1]:  # XLNet's rows: position first
                return mask.mT.reshape(-1) != 0
            if shape.numel() == mask.numel():
                return mask.reshape(-1) != 0
        mask = self.masks[0]
        if len(shape) == 1 and shape[0] == mask.shape[0]:  # one row for each sequence (a pooler): no padding in it
            return None
        if self.of_features is not None and len(shape) == 2 and shape[0] == mask.shape[0]:
            return self.of_features(shape[1], mask).reshape(-1) != 0
        if not self.strict:
            _say(name)
            return None
        raise CollectionError(
            f"{name}: its input has shape {tuple(x.shape)}, the padding mask {tuple(mask.shape)}: which rows are padding cannot be told. Pass"
            " mask=None (all rows count), a function that returns the mask that fits, or leave the module out with `modules`."
        )


@cache
def _say(name: str) -> None:
    """Once for each module; the first of them is seen by everyone."""
    logger.log(
        logging.INFO if _say.cache_info().currsize else logging.WARNING,
        "%s: its rows are of something else than the inputs (positions, pooled states ...): no padding is left out",
        name,
    )


def padding_of(model: nn.Module, batch: Any, mask: Mask) -> Padding | None:
    """A batch's padding as `model` reads it, or None where all rows count. Raises as `mask_of`, and `CollectionError` for a mask of another shape
    than the inputs that it belongs to."""
    found = mask_of(batch, mask)
    if found is None:
        return None
    if callable(mask):
        return Padding((found,), strict=True)
    ids, decoder = batch.get("input_ids"), batch.get("decoder_attention_mask")
    if isinstance(ids, Tensor) and ids.shape[: found.dim()] != found.shape:
        raise CollectionError(
            f"{mask}: the padding mask has shape {tuple(found.shape)}, input_ids {tuple(ids.shape)}: which rows are padding cannot be told. Give one"
            " of the same shape, or mask=None (all rows count)."
        )
    if decoder is None:
        of = next((batch[n] for n in ("decoder_input_ids", "labels") if isinstance(batch.get(n), Tensor)), None)
        decoder = torch.ones_like(of) if of is not None and of.dim() == 2 else None
    inner: Any = getattr(model, "base_model", model)
    tells: Any = getattr(inner, "_get_feature_vector_attention_mask", None)
    return Padding((found,) if decoder is None else (found, decoder), tells)


def kept_rows(name: str, x: Tensor, padding: Padding | None) -> Tensor:
    """The rows of module `name`'s input `x` (..., in) that are no padding. Raises `CollectionError` where that cannot be told."""
    keep = None if padding is None else padding.rows(name, x)
    rows = x.reshape(-1, x.shape[-1])
    return x if keep is None or bool(keep.all()) else rows[keep]


def call_model(model: Callable[..., Any], batch: Any) -> Any:
    """`model(**batch)`, `model(*batch)` or `model(batch)`, as the batch is a mapping, a tuple or neither.

    Raises `CollectionError` for whatever the model raises: a batch that does not fit it may end anywhere in it.
    """
    with errors_named(type(getattr(model, "module", model)).__name__, "a batch", batch):
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, tuple):
            return model(*batch)
        return model(batch)


@contextmanager
def errors_named(
    what: str, on: str, given: Any, remedy: str = "Check the names, shapes and values of its inputs."
) -> Iterator[None]:
    """Whatever a model or a part of it raises becomes a `CollectionError` that names it and what it was given."""
    try:
        yield
    except (BmmError, Stop):
        raise
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise CollectionError(
            f"{what} cannot run on {on} of {_described(given)} ({type(error).__name__}: {first[:300]}). {remedy}"
        ) from error


def _described(batch: Any) -> str:
    """Names and shapes of a batch's tensors."""
    named = (
        batch.items()
        if isinstance(batch, Mapping)
        else enumerate(batch)
        if isinstance(batch, tuple)
        else [("one input", batch)]
    )
    shapes = [
        f"{str(name)[:60]} {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
        for name, value in named
    ]
    return ", ".join(shapes[:8])

"""Calling a model on a batch: where it lies, its padding mask, which rows of an input are no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.errors import BmmError, CollectionError, ConfigError, EmptyCalibrationError

Mask = str | Callable[[Any], Tensor | None] | None


class Stop(Exception):
    """Ends a forward pass that has come far enough."""


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


def kept_rows(name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of module `name`'s input `x` (..., in) that `mask` (batch, length) keeps. Raises `CollectionError` where it does not fit."""
    keep = row_mask(name, x, mask)
    rows = x.reshape(-1, x.shape[-1])
    return x if keep is None or bool(keep.all()) else rows[keep]


def row_mask(name: str, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which of the rows of `x` (..., in), leading dimensions flattened, `mask` keeps; None for all. Raises as `kept_rows` does."""
    if mask is None:
        return None
    if x.shape[:-1] == mask.shape or x.numel() // x.shape[-1] == mask.numel():
        return mask.reshape(-1) != 0
    if x.dim() == 2 and x.shape[0] == mask.shape[0]:  # one row for each sequence (a pooler): no padding in it
        return None
    raise CollectionError(
        f"{name}: its input has shape {tuple(x.shape)}, the padding mask {tuple(mask.shape)}: which rows are padding cannot be told. Pass"
        " mask=None (all rows count), a function that returns the mask that fits, or leave the module out with `modules`."
    )


def call_model(model: Callable[..., Any], batch: Any) -> Any:
    """`model(**batch)`, `model(*batch)` or `model(batch)`, as the batch is a mapping, a tuple or neither.

    Raises `CollectionError` for whatever the model raises: a batch that does not fit it may end anywhere in it.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, tuple):
            return model(*batch)
        return model(batch)
    except (BmmError, Stop):
        raise
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise CollectionError(
            f"{getattr(type(model), '__name__', 'The model')} cannot run on a batch of {_described(batch)} ({type(error).__name__}: {first[:300]})."
            " Check the names, shapes and values of its inputs."
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

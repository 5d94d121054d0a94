"""CuPy arrays, NumPy arrays and whatever else speaks DLPack, as arguments of the public tensor functions, without a copy."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from bmm_engine.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


# What the public functions call the arguments that they write to.
_WRITTEN = ("G", "Gs", "C", "a", "out", "counts")


def accepts_dlpack(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` take any object with `__dlpack__` where it takes a tensor, alone or in a list or tuple.

    The tensor made of such an object shares its memory, on its device; torch's current stream waits for what the other
    library has under way there. Where the function returns one of its arguments, the caller's own object is returned;
    new results are tensors. Raises `ConfigError` for memory that cannot be shared (of a dtype that torch lacks), or that
    is read-only where the function would write.
    """
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(map(_needs_sharing, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        originals: dict[int, Any] = {}
        shared_args: Any = [_share(value, name, originals) for name, value in zip(names, args, strict=False)]
        shared_kwargs: Any = {name: _share(value, name, originals) for name, value in kwargs.items()}
        result: Any = function(*shared_args, **shared_kwargs)
        return originals.get(id(result), result)

    return wrapper


def _foreign(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not isinstance(value, Tensor)


def _needs_sharing(value: Any) -> bool:
    return any(map(_foreign, value)) if isinstance(value, (list, tuple)) else _foreign(value)


def _share(value: Any, name: str, originals: dict[int, Any]) -> Any:
    """`value`, or tensors in its place; `originals` maps the id of each replacement to what it stands for."""
    if not _needs_sharing(value):
        return value
    replacement: Any
    if isinstance(value, (list, tuple)):
        replacement = [_share(item, name, originals) for item in value]
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        # torch itself would write through: DLPack's read-only flag does not reach its tensors.
        if name in _WRITTEN and getattr(getattr(value, "flags", None), "writeable", True) is False:
            raise ConfigError(f"{name} is a read-only {kind}, and would be written to; pass a writable array")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*not writable.*")  # reading it is all that happens
                replacement = from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{name}: this {kind} cannot be shared with torch through DLPack ({error}); pass an array of a floating dtype that"
                " torch has, or a tensor"
            ) from error
    originals[id(replacement)] = value
    return replacement

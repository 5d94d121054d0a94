"""What a module's output is added to: the residual stream, where it writes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


class Additions(TorchDispatchMode):
    """While it is on, follows one output through the additions that come first of all that is done with it.

    `caught(addend)` is called for each, before it is carried out, with the tensor (..., out) that the output is added to; it may raise to end
    the pass. As soon as anything else reads the output, or the sum, it is left.
    """

    def __init__(self, caught: Callable[[Tensor], None]):
        super().__init__()
        self._caught = caught
        self._followed: Tensor | None = None

    def follow(self, output: Any) -> None:
        self._followed = output if isinstance(output, Tensor) and output.is_contiguous() else None

    def leave(self) -> None:
        self._followed = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._followed is None or not any(self._is_followed(leaf) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        addend = self._addend(args) if func in ADDITIONS and kwargs.get("alpha", 1) == 1 else None
        if addend is not None:
            self._caught(addend.clone())  # an addition in place changes it
        result = func(*args, **kwargs)
        if addend is not None:
            self.follow(result)
        elif func._schema.is_mutable or not self._is_followed(result):  # a view is still the output
            self.leave()
        return result

    def _is_followed(self, value: Any) -> bool:
        own = self._followed
        if own is None or not isinstance(value, Tensor):
            return False
        return value is own or (
            value.data_ptr() == own.data_ptr() and value.numel() == own.numel() and value.is_contiguous()
        )

    def _addend(self, args: Any) -> Tensor | None:
        """What the followed tensor is added to, in its shape; None where that gives another shape, or is no tensor of that width."""
        one, other = args[:2]
        output, addend = (one, other) if self._is_followed(one) else (other, one)
        if not isinstance(addend, Tensor) or addend.shape[-1:] != output.shape[-1:] or addend.dim() > output.dim():
            return None
        try:
            return addend.expand(output.shape)
        except RuntimeError:
            return None

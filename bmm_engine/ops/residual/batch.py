"""Batches of matrices, as the kernels of the residual take them."""

from __future__ import annotations

from torch import Tensor


def batched(tensor: Tensor) -> Tensor | None:
    """`tensor` (..., rows, columns) as a view (members, rows, columns), or None where its strides do not allow it."""
    try:
        return tensor[None] if tensor.ndim == 2 else tensor.view(-1, *tensor.shape[-2:])
    except RuntimeError:
        return None

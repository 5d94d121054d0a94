"""Passthrough: one model's tensors, as they are or scaled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.settings import PerExpert, each


@anchor(scope="tensor", elementwise=True, experts=(1, 1), paper="mergekit passthrough")
def passthrough(base: Tensor, experts: Sequence[Tensor], *, scale: PerExpert[float] = each(1.0)) -> Tensor:
    """`W = scale * W_1`: the expert's tensor, unchanged where `scale` is 1."""
    return experts[0] * scale[0]

"""Task arithmetic (arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bmm_engine.anchors.contract import anchor


@anchor(scope="tensor", elementwise=True, paper="Ilharco et al. 2023, arXiv 2212.04089")
def task_arithmetic(base: Tensor, experts: Sequence[Tensor], *, scaling: float = 0.3) -> Tensor:
    """`W = W_0 + a sum_t (W_t - W_0)`, `a = scaling`."""
    out = base.clone()
    for expert in experts:
        out.add_(expert - base, alpha=scaling)
    return out

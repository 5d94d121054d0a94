"""MagMax: of the task vectors' entries, the largest (arXiv 2407.06322)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.ops.blend import blend


@anchor(scope="tensor", elementwise=True, stored=True, symmetric=False, paper="Marczak et al. 2024, arXiv 2407.06322")
def magmax(base: Tensor, experts: Sequence[Tensor], *, scaling: float = 0.5) -> Tensor:
    """`W = W_0 + scaling m`, m the entry of largest magnitude over the tasks, the later task's of equals.

    `scaling`: 0.5 is the authors' for models fine-tuned apart.
    """
    return blend(base, experts, combine="largest", scaling=scaling)

"""Consensus task arithmetic: entries that TALL masks show to matter to several tasks (arXiv 2405.07813)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.domains import NonNegative
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.ops.blend import blend


@anchor(scope="tensor", elementwise=True, stored=True, paper="Wang et al. 2024, arXiv 2405.07813")
def consensus_ta(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    dominance: PerExpert[NonNegative] = each(0.4),
    votes: Annotated[int, Field(ge=1)] = 2,
    scaling: float = 0.3,
) -> Tensor:
    """`W = W_0 + scaling m S`, `S = sum_t tau_t`, where m is 1 if `|tau_t| > dominance_t |S - tau_t|` for at least `votes` tasks, else 0.

    `dominance`: lambda_t of the TALL mask; the authors choose it per task from 0.2 to 0.6 on validation data, the default is the middle.
    `votes`: 2 drops what matters to no task or to one alone. `scaling`: chosen on validation data too.
    """
    return blend(base, experts, combine="consensus", dominance=dominance, votes=votes, scaling=scaling)

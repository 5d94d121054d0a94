"""NearSwap: take over the expert's entries where they are near the base's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.domains import NonNegative


@anchor(
    scope="tensor",
    elementwise=True,
    experts=(1, 1),
    symmetric=False,
    paper="alchemonaut 2024, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
)
def nearswap(base: Tensor, experts: Sequence[Tensor], *, t: NonNegative = 1e-4) -> Tensor:
    """`W = (1 - w) W_0 + w W_1` with `w = min(1, t / abs(W_1 - W_0))` per entry.

    That is a step of at most `t` towards the expert: `W_0 + clip(W_1 - W_0, -t, t)`.
    """
    return base + (experts[0] - base).clamp_(-t, t)

"""Sparse task vectors: one alone, the ranks it is thinned by, and what it is scaled by to make up for the entries it lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.anchors.select import difference
from bmm_engine.errors import NonFiniteWeightError
from bmm_engine.ops.blend import blend
from bmm_engine.ops.ranks import magnitude_ranks


def kept_alone(
    base: Tensor,
    expert: Tensor,
    t: int,
    *,
    lower: float | None = None,
    upper: float | None = None,
    keep: float | tuple[float, float] | None = None,
    seed: int = 0,
    ranks: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """The task vector of expert `t` with zeros where the masks of `blend` drop it, in float32 (float64 if either is).

    Raises `NonFiniteWeightError` as `blend` does on all experts.
    """
    tau = difference(expert, base)
    if not bool(tau.isfinite().all()):
        raise not_finite(base, t)
    return blend(
        torch.zeros_like(tau),
        [tau],
        lower=[lower],
        upper=[upper],
        keep=None if keep is None else [keep],
        seeds=None if keep is None else [seed],
        ranks=None if ranks is None else [ranks],
        first=first,
    )


def not_finite(base: Tensor, t: int) -> NonFiniteWeightError:
    """The error for a task vector `t` that is not finite: the base's fault, or the expert's."""
    index = t + 1 if bool(base.isfinite().all()) else 0
    name = f"experts[{t}]" if index else "base"
    return NonFiniteWeightError(f"{name} {tuple(base.shape)} holds NaN or infinity", index=index)


def row_ranks(base: Tensor, expert: Tensor, t: int, rows: tuple[int, int]) -> Tensor:
    """Ranks from 0 to 1 of |expert - base| within its rows, when it is cut into `rows`; in base's shape. Raises `NonFiniteWeightError`."""
    try:
        return magnitude_ranks(expert.reshape(rows), base.reshape(rows)).reshape(base.shape)
    except NonFiniteWeightError:
        raise not_finite(base, t) from None


def l1_scale(base: Tensor, expert: Tensor, kept: Tensor) -> float:
    """What gives `kept` the L1 norm of the whole task vector; 1 where either is zero."""
    before = float(difference(expert, base).abs().sum(dtype=torch.float64))
    after = float(kept.abs().sum(dtype=torch.float64))
    return before / after if before and after else 1.0


def linear_scale(weight: Sequence[float], scaling: float, normalize: bool) -> float:
    """`scaling`, with `normalize` over the sum of the weights (a sum of about 0 counts as 1)."""
    total = sum(weight)
    return scaling / total if normalize and abs(total) >= 1e-8 else scaling

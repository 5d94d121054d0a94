"""DC-Merge: merge small cores in bases that the tasks' singular vectors share (arXiv 2603.06242)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.domains import PositiveShare
from bmm_engine.anchors.polar import polar_factor, task_triples


@anchor(scope="module", others="scaled", paper="Zhang et al. 2026, arXiv 2603.06242")
def dc_merge(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    scaling: float = 1.0,
    combine: Literal["ties", "sum"] = "ties",
    density: PositiveShare = 0.001,
    rank: Annotated[int, Field(ge=1)] | None = None,
    smoothing: Literal["none", "average", "linear"] = "none",
    ratio: Annotated[float, Field(ge=1)] = 5.0,
) -> Tensor:
    """`U = polar(U^)`, `V = polar(V^)` of stacked top-r triples, `M_t = U^T tau_t V`, `W = W_0 + scaling U blocks(M) V^T`, M the merged M_t.

    tau_t is its top r triples, `blocks` keeps the blocks (t, t) of each task's own directions. `combine`: "ties" keeps the `density` share of
    each core's largest entries (at least one), elects the sign of their sum and averages those that agree; "sum" adds the cores. `rank`: r at
    most; `floor(min(out, in) / T)` without it. `smoothing`: the r singular values are first all set to their mean ("average"), or to a line that
    falls from s to 1 with the same sum ("linear", `s = min(ratio, s_1 / s_r)`). The authors' code: full fine-tunes "none"; LoRA rank 16 and
    "average"; `scaling` by validation, 0.1 to 3. Directions that a task vector lacks are left out, as in TSV-M.
    """
    room = min(base.shape) // len(experts)
    triples = task_triples(site, room if rank is None else min(rank, room))
    left, strength, right = zip(*((u, _smoothed(s, smoothing, ratio), vh) for u, s, vh in triples), strict=True)
    u, _ = polar_factor(torch.cat(left, 1), complete=False)  # (out, n), n <= T r
    vh, _ = polar_factor(torch.cat(right, 0), complete=False)  # (n, in)
    cores = [((u.mT @ a) * s) @ (b @ vh.mT) for a, s, b in zip(left, strength, right, strict=True)]
    core = torch.stack(cores).sum(0) if combine == "sum" else _elected([_largest(c, density) for c in cores])
    own = torch.block_diag(*(torch.ones(len(s), len(s), dtype=torch.bool) for s in strength)).to(core.device)
    return (base.double() + scaling * (u @ torch.where(own, core, 0.0) @ vh)).to(base.dtype)


def _smoothed(strength: Tensor, smoothing: str, ratio: float) -> Tensor:
    """Singular values (r,), descending, spread anew; their sum stays."""
    if smoothing == "none" or not len(strength):
        return strength
    steepness = 1.0 if smoothing == "average" else min(ratio, float(strength[0] / strength[-1]))
    line = torch.linspace(steepness, 1.0, len(strength), dtype=strength.dtype, device=strength.device)
    return line * (strength.sum() / line.sum())


def _largest(core: Tensor, density: float) -> Tensor:
    """The `density` share of the entries that are largest in magnitude, at least one; zeros elsewhere."""
    if not core.numel():
        return core
    kept = max(1, int(density * core.numel()))
    magnitudes = core.abs()
    least = magnitudes.flatten().kthvalue(core.numel() - kept + 1).values
    return torch.where(magnitudes >= least, core, 0.0)


def _elected(cores: Sequence[Tensor]) -> Tensor:
    """The mean of those entries that have the sign of their sum; 0 where that is 0."""
    stack = torch.stack(list(cores))
    sign = stack.sum(0).sign()
    agreeing = (stack.sign() == sign) & (sign != 0)
    return torch.where(agreeing, stack, 0.0).sum(0) / agreeing.sum(0).clamp(min=1)

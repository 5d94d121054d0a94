"""EpiMer: the Frechet mean of the tasks in the subspace of their singular vectors (arXiv 2605.26693)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bmm_engine.anchors.contract import Need, Site, anchor
from bmm_engine.anchors.domains import NonNegative, Rank
from bmm_engine.anchors.measured import measured_at, times
from bmm_engine.anchors.polar import task_subspace
from bmm_engine.errors import NonFiniteGramError, NotPositiveDefiniteError
from bmm_engine.ops.cholesky import cholesky_, solve_right

_NEEDS: dict[str, tuple[Need, ...]] = {
    "fisher": ("fishers",),
    "kfac": ("grams", "sensitivities"),
    "gram": ("grams",),
    "identity": (),
}


def _needs(parameters: Mapping[str, Any]) -> tuple[Need, ...]:
    return _NEEDS[parameters["metric"]]


@anchor(scope="module", others="scaled", needs=_needs, paper="Lu et al. 2026, arXiv 2605.26693")
def epimer(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    metric: Literal["fisher", "kfac", "gram", "identity"] = "fisher",
    coordinates: Literal["labelled", "exact"] = "labelled",
    rank: Rank = 32,
    scaling: float = 1.0,
    damping: NonNegative = 1e-3,
    ridge: NonNegative = 0.0,
    normalize: bool = False,
) -> Tensor:
    """TSV-M's atoms, weighed by curvature: `W = W_0 + scaling sum_a d_a u_a v_a^T`, `d = T (sum_t H_t)^{-1} sum_t H_t d_t`.

    The atoms are the top `rank` singular pairs of each task vector, orthogonalised (`tsv_m` at that rank); `d_t` holds task t's singular values at
    its own atoms and 0 at the others', H_t (p, p) is its curvature along the atoms. Where all tasks have the same, it is `tsv_m`.
    `metric`: H_t projects "fisher", the diagonal Fisher information (the paper's: the empirical one, `collect_fisher(labels="data")`); "kfac",
    `S_t (x) G_t`, its sensitivity and Gram, so that `H_t = (U^T S_t U) * (V^T G_t V)`; "gram", the same with `S_t = I`: an atom is kept by its
    owner's share of the Grams along it; "identity", which is `tsv_m`. `normalize`: divide each H_t by its trace, so that no expert counts more for
    its sharper likelihood.
    `coordinates`: "labelled", the paper's; or "exact", the minimiser of `sum_t <M - tau_t, H_t (M - tau_t)>` over all M that the atoms span. That
    has no factor T and wants no `scaling`, but is only as good as its metric: with "fisher" it can be much worse than "labelled".
    `damping` (relative to the mean diagonal of `mean_t H_t`, and added to every H_t) pulls d towards `tsv_m`'s, and so does `ridge`, in the same
    unit: with "exact" this is BMM restricted to the atoms, with TSV-M as the anchor. Either infinite: `tsv_m`. The best `scaling` differs from
    `tsv_m`'s and between metrics; search it for each.

    Diagnostics, of labelled coordinates whatever `coordinates` says: with `F(x) = mean_t (x - d_t)^T H_t (x - d_t)`, H_t damped, `eta` is
    `F(mean_t d_t) - F(d / T) >= 0`, and `share` is eta / F(mean_t d_t): 0 where all tasks have one curvature. Both grow with the rank, and compare
    merges of one backbone.
    Raises `ConfigError`, `ShapeMismatchError`, `NonFiniteGramError`; `NotPositiveDefiniteError` where there is neither damping nor ridge.
    """
    tasks, damping = len(experts), damping + ridge
    u, strength, vh = task_subspace(site, min(rank, min(base.shape) // tasks))
    owned = torch.block_diag(*(values[None] for values in strength))  # row t is d_t (T, p)
    summed = owned.sum(0)  # TSV-M's
    curvature, pulls = _projected(site, u, vh, exact=coordinates == "exact")
    if normalize:
        traces = curvature.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(u.dtype).tiny)
        curvature, pulls = curvature / traces[:, None, None], pulls / traces[:, None]
    mean = curvature.mean(0)
    level = float(mean.diagonal().mean()) if len(mean) else 0.0
    if not math.isfinite(level):
        raise NonFiniteGramError(
            f"{site.name}: the {metric} curvature along its atoms is {level}; collect again what it was made of.",
            module=site.name,
            count=int((~torch.isfinite(curvature)).sum()),
        )
    merged, eta, share = summed, 0.0, 0.0
    if level and not math.isinf(damping):  # without any curvature the tasks have the same
        # Around TSV-M's d, where damping every H_t is a ridge: what equal curvatures give is exact, and what none sees stays there.
        labelled = (curvature @ owned[:, :, None]).sum(0)[:, 0] - mean @ summed
        exact = pulls.mean(0) - mean @ summed
        moves = _solve(mean / level, torch.stack([labelled, exact]) / level, damping, site.name)
        merged = summed + moves[int(coordinates == "exact")]
        eta = float(labelled @ moves[0]) / tasks**2
        from_mean = owned - owned.mean(0)
        spread = (
            torch.einsum("ta,tab,tb->", from_mean, curvature, from_mean) + damping * level * from_mean.square().sum()
        )
        share = eta / (float(spread) / tasks) if spread else 0.0
    site.diagnostics.update(eta=eta, share=share)
    return (base.double() + scaling * ((u * merged) @ vh)).to(base.dtype)


def _projected(site: Site, u: Tensor, vh: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Of each task `H_t = S^T H S` (T, p, p), S the atoms `u_a v_a^T` as columns; and `S^T H vec(tau_t)` (T, p), where that is wanted, else zeros."""
    metric, tasks, atoms = site.parameters["metric"], len(site.experts), len(vh)
    curvature, pulls = u.new_zeros(tasks, atoms, atoms), u.new_zeros(tasks, atoms)
    fishers = measured_at(site, "fishers") if metric == "fisher" else None
    grams = measured_at(site, "grams") if "grams" in _NEEDS[metric] else None
    sensitivities = measured_at(site, "sensitivities") if metric == "kfac" else None
    for t, expert in enumerate(site.experts):
        tau = expert.double() - site.base.double() if exact else None
        if fishers is not None:
            fisher = fishers[t].double()
            for a in range(atoms):
                along = fisher * torch.outer(u[:, a], vh[a])
                curvature[t, a, a:] = curvature[t, a:, a] = (u[:, a:] * (along @ vh[a:].mT)).sum(0)
            if tau is not None:
                pulls[t] = ((u.mT @ (fisher * tau)) * vh).sum(1)
            continue
        left = u.mT if sensitivities is None else times(u.mT.contiguous(), sensitivities[t], site.name)  # (p, out)
        right = vh if grams is None else times(vh, grams[t], site.name)  # (p, in)
        product = (left @ u) * (right @ vh.mT)
        curvature[t] = (product + product.mT) / 2
        if tau is not None:
            pulls[t] = ((left @ tau) * right).sum(1)
    return curvature, pulls


def _solve(mean: Tensor, right: Tensor, damping: float, name: str) -> Tensor:
    """`right (mean + damping I)^{-1}` (n, p)."""
    mean = mean.contiguous()
    mean.diagonal().add_(damping)
    lower, info = cholesky_(mean)
    if pivot := int(info):
        raise NotPositiveDefiniteError(
            f"{name}: the mean curvature along its {len(mean)} atoms has no Cholesky factor (leading minor {pivot}) with damping {damping:g}; give a"
            " larger `damping`, or a smaller `rank`.",
            module=name,
            pivot=pivot,
            ridge=damping,
        )
    return solve_right(lower, right)

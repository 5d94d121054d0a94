"""ACE-Merging: regression on second moments that the task vectors themselves tell (arXiv 2603.02945)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.domains import NonNegative, Share
from bmm_engine.anchors.polar import singular_triples, task_vectors
from bmm_engine.anchors.regmean import NormalEquations, solve

# Added to traces, as in the authors' code.
_TINY = 1e-12


@anchor(scope="module", others="scaled", paper="Xu et al. 2026, arXiv 2603.02945")
def ace(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    scaling: float = 1.0,
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01,
    center: bool = True,
    collective: bool = True,
    unevenness: NonNegative = 0.3,
    fraction: Share = 0.3,
) -> Tensor:
    """`W = W_0 + scaling sum_t C_t S_t (sum_t S_t + 1 c^T)^{-1}`, `C_t` = tau_t less its mean row, `S_t = C_t^T C_t + ridge I`.

    `center`: without it `C_t = tau_t`. `collective`: without it `c = 0`; c is the mean row of `sum_t C_t^T C_t`. Where task vectors differ much
    in size, `var_t(l_t) / mean_t(l_t)^2 > unevenness` with `l_t = log ||tau_t||^2`, every `C_t^T C_t` and its ridge are divided by `||C_t||^2`, c
    by the mean `||tau_t||^2` too, and a second stage is added to the merged task vector M: of `M + sum_t tau_t (C_t^T C_t / ||C_t||^2 - mean_s S_s)`
    the largest `fraction` of the singular directions, each as strong as they are on average (inf: never). This is the authors' code; `ridge` and
    the logarithms are absolute in it, so the unit of weights matters. A task vector of zeros takes no part, where in their code it would
    silence the others. Without `center` and `collective` it is RegMean on data-free Grams.
    Raises `NotPositiveDefiniteError`.
    """
    taus = [tau for tau in task_vectors(base, experts) if bool(tau.any())]
    if not taus:
        return base.clone()
    sizes = [float(tau.square().sum()) for tau in taus]
    uneven = _unevenness(sizes) > unevenness
    centred = [tau - tau.mean(0, keepdim=True) for tau in taus] if center else taus
    weights = [1 / (float(c.square().sum()) + _TINY) if uneven else 1.0 for c in centred]
    width = base.shape[1]
    moments = base.new_zeros(width, width, dtype=torch.float64)  # without the ridge
    rhs = torch.zeros_like(taus[0])
    for c, weight in zip(centred, weights, strict=True):
        moments.addmm_(c.mT, c, alpha=weight)
        rhs += weight * (c @ (c.mT @ c) + ridge * c)
    ridges = ridge * sum(weights)
    a = moments.clone()
    a.diagonal().add_(ridges)
    row = moments.mean(0, keepdim=True)
    row = row * (float(collective) / (sum(sizes) / len(sizes) + _TINY if uneven else 1.0))
    merged = _solve_with_row(a, rhs, row, site.name)
    if uneven:
        merged = merged + _second_stage(merged, taus, centred, weights, a / len(taus), fraction)
    return (base.double() + scaling * merged).to(base.dtype)


def _unevenness(sizes: Sequence[float]) -> float:
    """`var(log) / mean(log)^2` of the squared norms; 0 for one."""
    logs = [math.log(size + _TINY) for size in sizes]
    mean = math.fsum(logs) / len(logs)
    variance = math.fsum((one - mean) ** 2 for one in logs) / max(len(logs) - 1, 1)
    return variance / (mean**2 + _TINY)


def _solve_with_row(a: Tensor, rhs: Tensor, row: Tensor, name: str) -> Tensor:
    """`rhs (a + 1 row)^{-1}`, `a` (in, in) SPD, `rhs` (out, in), `row` (1, in): by Sherman and Morrison from one Cholesky factor of `a`."""
    both = torch.cat([rhs, row])
    found = solve(NormalEquations(torch.zeros_like(both), a, both), 0.0, name)
    plain, correction = found[:-1], found[-1:]
    return plain - plain.sum(1, keepdim=True) * correction / (1 + correction.sum())


def _second_stage(
    merged: Tensor,
    taus: Sequence[Tensor],
    centred: Sequence[Tensor],
    weights: Sequence[float],
    mean: Tensor,
    fraction: float,
) -> Tensor:
    """The largest directions of what is left of each task beside the mean moment, all equally strong."""
    count = int(min(merged.shape) * fraction)
    if not count:
        return torch.zeros_like(merged)
    residual = merged.clone()
    for tau, c, weight in zip(taus, centred, weights, strict=True):
        residual += weight * ((tau @ c.mT) @ c) - tau @ mean
    u, s, vh = singular_triples(residual, count)
    return (float(s.sum()) / count) * (u @ vh)

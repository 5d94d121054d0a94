"""WUDI: the merged task vector that interferes least with every task's own (arXiv 2503.08099)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.adam import adam
from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.domains import PositiveShare
from bmm_engine.anchors.polar import low_rank_of, task_vectors
from bmm_engine.ops.gram import accumulate_gram
from bmm_engine.solving.filters import gavish_donoho, participation_ratio, with_mass

# Pivots of a Cholesky factor below this share of the largest: too close to singular to solve with.
_PIVOT_RATIO = 1e-5


@anchor(scope="module", others="scaled", paper="Cheng et al. 2025, arXiv 2503.08099")
def wudi(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    scaling: float = 1.0,
    solver: Literal["adam", "closed_form", "spectral"] = "adam",
    norm: Literal["squared", "plain"] = "squared",
    steps: Annotated[int, Field(ge=1)] = 300,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5,
    filter: Literal["exponential", "participation", "gavish_donoho"] = "exponential",
    time: Annotated[float, Field(gt=0)] = 300.0,
    share: PositiveShare = 0.65,
) -> Tensor:
    """`W = W_0 + scaling M`, `M` the minimum of `sum_t ||(M - tau_t) tau_t^T||^2 / ||tau_t||^2`, sought from `sum_t tau_t`.

    `solver`: "adam" is `steps` of Adam at `learning_rate`, as the authors do, which stops well short of the minimum (and may generalise better
    for it); "closed_form" is the exact minimum, a hundred times sooner; "spectral" (SWUDI, arXiv 2606.07289) goes towards it as far as `filter`
    says along each eigenvector of the summed Grams `Q diag(e) Q^T`: `M = M_0 - R Q diag(f(e) / e) Q^T` from `M_0 = sum_t tau_t`, f = 1 the minimum.
    `filter`: "exponential" is gradient descent for a `time`, `f = 1 - exp(-e time)`, on the largest `share` of all directions (the authors take 0.65
    for CLIP and 0.85 for language models); "participation" (SWUDI-A) and "gavish_donoho" have f = 1 on the K largest: K is the participation
    ratio of the singular values `sqrt e`, or how many of those exceed the optimal hard threshold.
    `norm`: "plain" divides by the norm instead, as the authors' vision code does. `scaling`: 1 in FusionBench. A task vector of zeros takes no part.
    """
    taus = task_vectors(base, experts)
    objective = _objective(taus, site, norm)
    if objective is None:
        return base.clone()
    if solver == "closed_form":
        merged = objective.start - objective.correction()
    elif solver == "spectral":
        factors = partial(_factors, shape=base.shape, kind=filter, time=time, share=share)
        merged = objective.start - objective.filtered(factors)
    else:
        start = objective.start.to(base.dtype)
        merged = adam(start, objective.gradient(start), steps=steps, learning_rate=learning_rate).double()
    return (base.double() + scaling * merged).to(base.dtype)


@dataclass(frozen=True)
class _Formed:
    """The objective by `S = sum_t G_t` (in, in) and `R = sum_t (M_0 - tau_t) G_t` (out, in), where `G_t = tau_t^T tau_t / c_t` and `M_0 = sum tau_t`.

    Its gradient is `2 ((M - M_0) S + R)`, so the minimum that descent from M_0 leads to is `M_0 - R S^+`: what S does not reach (where every tau_t,
    and so M_0, is zero) stays as it is.
    """

    start: Tensor
    gram: Tensor
    residual: Tensor

    def correction(self) -> Tensor:
        """`R S^+`"""
        return _times_inverse(self.residual, self.gram)

    def filtered(self, factors: Callable[[Tensor], Tensor]) -> Tensor:
        """`R Q diag(f(e) / e) Q^T`"""
        return _times_filtered(self.residual, self.gram, factors)

    def gradient(self, start: Tensor) -> Callable[[Tensor], Tensor]:
        """One product, where the authors' code has two for each task; in the dtype of `start`, which is M_0."""
        gram, residual = self.gram.to(start.dtype), self.residual.to(start.dtype)
        return lambda M: torch.addmm(residual, M - start, gram).mul_(2.0)


@dataclass(frozen=True)
class _Factored:
    """The same by `S = Z^T Z` and `R = L Z` with few rows Z (n, in) and L (out, n): `R S^+ = L (Z Z^T)^+ Z`."""

    start: Tensor
    rows: Tensor
    left: Tensor

    def correction(self) -> Tensor:
        return _times_inverse(self.left, self.rows @ self.rows.mT) @ self.rows

    def filtered(self, factors: Callable[[Tensor], Tensor]) -> Tensor:
        """The eigenvalues of `Z Z^T = P diag(e) P^T` are those of S, and `R Q diag(f(e) / e) Q^T = L P diag(f(e) / e) P^T Z`."""
        return _times_filtered(self.left, self.rows @ self.rows.mT, factors) @ self.rows

    def gradient(self, start: Tensor) -> Callable[[Tensor], Tensor]:
        rows, left = self.rows.to(start.dtype), self.left.to(start.dtype)
        return lambda M: torch.addmm(left, M - start, rows.mT).mul_(2.0) @ rows


def _objective(taus: Sequence[Tensor], site: Site, norm: str) -> _Formed | _Factored | None:
    """None where all task vectors are zero."""
    low_rank = low_rank_of(site)
    start = torch.zeros_like(taus[0])
    used, rows = [], []
    for tau, product in zip(taus, low_rank, strict=True):
        if size := float(tau.norm()):
            start += tau
            used.append(tau)
            # (n_t, in): rows with the same Gram as tau_t, few where it is a product
            own = tau if product is None else product.gram_factor()
            rows.append(own / (size if norm == "squared" else math.sqrt(size)))
    if not used:
        return None
    width = start.shape[1]
    if 2 * sum(map(len, rows)) <= width:
        left = torch.cat([(start - tau) @ own.mT for tau, own in zip(used, rows, strict=True)], 1)
        return _Factored(start, torch.cat(rows), left)
    gram, residual = start.new_zeros(width, width), torch.zeros_like(start)
    for tau, own in zip(used, rows, strict=True):
        if 2 * len(own) <= width:
            accumulate_gram(gram, own)
            residual += ((start - tau) @ own.mT) @ own
        else:
            part = accumulate_gram(torch.zeros_like(gram), own)
            gram += part
            residual += (start - tau) @ part
    return _Formed(start, gram, residual)


def _times_inverse(B: Tensor, A: Tensor) -> Tensor:
    """`B A^+` for a symmetric positive semidefinite A: by Cholesky, or, near singularity, by eigenvectors."""
    factor, failed = torch.linalg.cholesky_ex(A)
    pivots = factor.diagonal()
    if not failed and float(pivots.min()) > _PIVOT_RATIO * float(pivots.max()):
        return torch.cholesky_solve(B.mT, factor).mT
    values, vectors = torch.linalg.eigh(A)
    kept = values > len(A) * torch.finfo(A.dtype).eps * values[-1]
    basis = vectors[:, kept]
    return ((B @ basis) / values[kept]) @ basis.mT


def _times_filtered(B: Tensor, A: Tensor, factors: Callable[[Tensor], Tensor]) -> Tensor:
    """`B Q diag(factors(e)) Q^T` for a symmetric positive semidefinite `A = Q diag(e) Q^T`."""
    values, vectors = torch.linalg.eigh(A)
    return ((B @ vectors) * factors(values)) @ vectors.mT


def _factors(eigenvalues: Tensor, *, shape: Sequence[int], kind: str, time: float, share: float) -> Tensor:
    """`f(e) / e` (n,) of the n largest eigenvalues, ascending, of a Gram (in, in); the others are 0. `shape` (out, in) is the module's, whose aspect
    the threshold of Gavish and Donoho takes, as the authors' code does."""
    width = shape[1]
    spectrum = torch.cat([eigenvalues.new_zeros(width - len(eigenvalues)), eigenvalues])
    if kind == "exponential":
        count = max(1, math.ceil(share * width - 1e-9))  # 0.7 of 10 is 7, whatever floats say
        factors = -torch.expm1(-time * spectrum) / spectrum
    else:
        count = (
            participation_ratio(spectrum)
            if kind == "participation"
            else gavish_donoho(spectrum, min(shape) / max(shape))
        )
        factors = 1 / spectrum
    kept = with_mass(spectrum)
    kept[: width - count] = False
    return torch.where(kept, factors, 0.0)[width - len(eigenvalues) :]

"""The solve in which errors of some outputs matter more than others, and for each task other ones.

    W* = argmin_W  sum_t beta_t / n_t || (X~_t W^T - X_t W_t^T) S_t^{1/2} ||_F^2 + lam || S^{1/2} (W - W_a) ||_F^2,

where S_t (out, out) is how much task t's predictions depend on the module's outputs (`bmm_engine.sensitivity`), and S = sum_t beta_t S_t / sum_t
beta_t. Its normal equations couple all outputs:

    sum_t beta_t S_t Z A_t + lam S Z = sum_t beta_t S_t R_t,    Z = W* - W_a,    A_t = G~_t / n_t,    R_t = (W_t - W_a) A_t - Q_t / n_t

(G~_t and Q_t as in `moments.py`). Where all S_t are equal this is `solve_module`. They are solved by conjugate gradients, preconditioned by
S Z (sum_t beta_t A_t + lam I), whose Cholesky factors are at hand.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bmm_engine.errors import NotPositiveDefiniteError, NumericalWarning, ShapeMismatchError
from bmm_engine.sequential.metrics import OutputMetric
from bmm_engine.sequential.moments import TaskMoments
from bmm_engine.solve import Factor

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-11}
"""Of the residual's norm, in the preconditioner's metric, beside that of the right-hand side. The objective's error goes with its square."""

STEPS = 300


def solve_weighted_module(
    anchor: Tensor,
    experts: Sequence[Tensor],
    moments: Sequence[TaskMoments],
    task_weights: Sequence[float],
    factor: Factor,
    mean_weight: float,
    metrics: Sequence[OutputMetric],
    name: str,
) -> tuple[Tensor, list[float], list[float]]:
    """`W*` (out, in), and per task the squared misfit (not weighted) of the anchor and of `W*`, over n.

    Computed in the moments' dtype, but for the right-hand side, in float64. Warns (`NumericalWarning`) where the tolerance is not reached.
    Raises `ShapeMismatchError`, `NotPositiveDefiniteError`.
    """
    for metric in metrics:
        if metric.outputs != anchor.shape[0]:
            raise ShapeMismatchError(
                f"{name}: a sensitivity of {metric.outputs} outputs for {anchor.shape[0]}; was it measured on another model?"
            )
    gram = moments[0].gram
    system = _System(moments, task_weights, factor, mean_weight, [metric.to(gram) for metric in metrics], name)
    change, left = system.solve(*system.sides(anchor, experts))
    if not left <= TOLERANCE[gram.dtype]:
        warnings.warn(
            f"{name}: the weighted solve stopped at a relative residual of {left:.1e} after {STEPS} steps; raise `alpha` or lower"
            " `sensitivity_share`.",
            NumericalWarning,
            stacklevel=2,
        )
    solved = (anchor.double() + change.double()).to(anchor.dtype)
    before, after = (
        [own.misfit(weight, expert) / own.rows for expert, own in zip(experts, moments, strict=True)]
        for weight in (anchor, solved)
    )
    return solved, before, after


class _System:
    """The normal equations of one module, as `sum_t beta_t S_t Z (A_t + lam I / sum_t beta_t) = ...`, with S_t = level_t I + V_t V_t^T."""

    def __init__(
        self,
        moments: Sequence[TaskMoments],
        task_weights: Sequence[float],
        factor: Factor,
        mean_weight: float,
        metrics: Sequence[OutputMetric],
        name: str,
    ):
        self.moments, self.betas, self.factor, self.mean_weight = moments, task_weights, factor, mean_weight
        self.metrics, self.dtype = metrics, moments[0].gram.dtype
        total = sum(task_weights)
        self._ridge = (factor.ridge + factor.jitter) / total
        self._means = [(own.total / own.rows).to(self.dtype) for own in moments]
        self._level = self._levels()
        mean_metric = sum(
            (m.dense().mul_(b / total) for m, b in zip(metrics, task_weights, strict=True)),
            torch.zeros((), dtype=self.dtype, device=factor.lower.device),
        )
        self._lower, failed = torch.linalg.cholesky_ex(mean_metric)
        if failed:
            raise NotPositiveDefiniteError(
                f"{name}: the mean of its output metrics is not positive definite (minor {int(failed)}). Give symmetric metrics with positive"
                " eigenvalues; `output_metrics` makes them of sensitivities.",
                module=name,
                pivot=int(failed),
                ridge=0.0,
            )
        # To precondition with, the working dtype is exact enough.
        self._factor = replace(factor, lower=factor.lower.to(self.dtype))

    def _levels(self) -> Tensor:
        """`sum_t beta_t level_t (A_t + ridge I)` (in, in): what of the left-hand side all outputs have in common."""
        total = torch.zeros_like(self.moments[0].gram)
        for own, mean, beta, metric in zip(self.moments, self._means, self.betas, self.metrics, strict=True):
            weight = beta * metric.level
            total.add_(own.gram, alpha=weight / own.rows)
            total.diagonal().add_(weight * self._ridge)
            if self.mean_weight:
                total.addr_(mean, mean, alpha=weight * self.mean_weight)
        return total

    def sides(self, anchor: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The right-hand side, and the solution for equal metrics."""
        total, alike = torch.zeros_like(anchor, dtype=self.dtype), torch.zeros_like(anchor, dtype=torch.float64)
        for own, expert, beta, metric in zip(self.moments, experts, self.betas, self.metrics, strict=True):
            gap = expert.double() - anchor.double()
            toward = (gap @ own.gram.double() - own.drifted(expert)) / own.rows
            if self.mean_weight:
                mean = own.total / own.rows
                shared = gap @ mean - own.drifted_total(expert) / own.rows
                toward.addr_(shared, mean, alpha=self.mean_weight)
            alike.add_(toward, alpha=beta)
            total.add_(metric.times(toward.to(self.dtype)), alpha=beta)
        return total, self.factor.solve(alike).to(self.dtype)

    def apply(self, z: Tensor) -> Tensor:
        """The left-hand side."""
        result = z @ self._level
        for own, mean, beta, metric in zip(self.moments, self._means, self.betas, self.metrics, strict=True):
            seen = metric.directions.mT @ z
            part = torch.addmm(seen, seen, own.gram, beta=self._ridge, alpha=1 / own.rows)
            if self.mean_weight:
                part.addr_(seen @ mean, mean, alpha=self.mean_weight)
            result.addmm_(metric.directions, part, alpha=beta)
        return result

    def precondition(self, residual: Tensor) -> Tensor:
        outer = torch.cholesky_solve(residual, self._lower)
        return self._factor.solve(outer)

    def solve(self, rhs: Tensor, z: Tensor) -> tuple[Tensor, float]:
        """The solution, found from `z` on, and the relative residual that is left."""
        whole = _dot(rhs, self.precondition(rhs))
        residual = rhs - self.apply(z)
        direction = ahead = self.precondition(residual)
        size = _dot(residual, ahead)
        for _ in range(STEPS):
            if size <= TOLERANCE[self.dtype] ** 2 * whole:
                break
            image = self.apply(direction)
            step = size / _dot(direction, image)
            z = z.add(direction, alpha=step)
            residual.sub_(image, alpha=step)
            ahead = self.precondition(residual)
            previous, size = size, _dot(residual, ahead)
            direction = ahead.add(direction, alpha=size / previous)
        return z, math.sqrt(max(0.0, size) / whole) if whole > 0 else 0.0


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))

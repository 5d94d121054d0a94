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

from bmm_engine.errors import ConfigError, NotPositiveDefiniteError, NumericalWarning, ShapeMismatchError
from bmm_engine.sequential.moments import TaskMoments
from bmm_engine.solve import Factor

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-11}
"""Of the residual's norm, in the preconditioner's metric, beside that of the right-hand side. The objective's error goes with its square."""

STEPS = 300


def output_metrics(sensitivities: Sequence[Tensor], share: float, name: str) -> list[Tensor]:
    """The metrics of modules that are weighed together, from one task's sensitivities of them (out, out): scaled to a mean eigenvalue of 1 over all,
    then `share` of that and `1 - share` of the identity, for what so few samples do not show. Zero sensitivities give the identity.

    Raises `ConfigError` for a `share` outside [0, 1), in which alone the metric is sure to be positive definite.
    """
    check_share(share)
    outputs = sum(len(own) for own in sensitivities)
    trace = sum(float(own.diagonal().sum(dtype=torch.float64)) for own in sensitivities)
    if not math.isfinite(trace) or trace < 0:
        raise ConfigError(f"{name}: the trace of its sensitivity is {trace}; it must be finite and >= 0.")
    if trace == 0:
        return [torch.eye(len(own), dtype=own.dtype, device=own.device) for own in sensitivities]
    scaled = [own * (share * outputs / trace) for own in sensitivities]
    for own in scaled:
        own.diagonal().add_(1 - share)
    return scaled


def check_share(value: float) -> None:
    """Raise `ConfigError` unless it is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"sensitivity_share must be a number >= 0 and < 1, not {value!r}.")


def solve_weighted_module(
    anchor: Tensor,
    experts: Sequence[Tensor],
    moments: Sequence[TaskMoments],
    task_weights: Sequence[float],
    factor: Factor,
    mean_weight: float,
    metrics: Sequence[Tensor],
    name: str,
) -> tuple[Tensor, list[float], list[float]]:
    """`W*` (out, in), and per task the squared misfit (not weighted) of the anchor and of `W*`, over n. `metrics[t]`: S_t (out, out).

    Computed in the moments' dtype, but for the right-hand side, in float64. Warns (`NumericalWarning`) where the tolerance is not reached.
    Raises `ShapeMismatchError`, `NotPositiveDefiniteError`.
    """
    for metric in metrics:
        if metric.shape != (anchor.shape[0], anchor.shape[0]):
            raise ShapeMismatchError(
                f"{name}: a sensitivity of shape {tuple(metric.shape)} for {anchor.shape[0]} outputs; was it measured on another model?"
            )
    dtype = moments[0].gram.dtype
    system = _System(
        moments, task_weights, factor, mean_weight, [metric.to(anchor.device, dtype) for metric in metrics], name
    )
    rhs = system.rhs(anchor, experts)
    change, left = system.solve(rhs)
    if not left <= TOLERANCE[dtype]:
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
    """The normal equations of one module."""

    def __init__(
        self,
        moments: Sequence[TaskMoments],
        task_weights: Sequence[float],
        factor: Factor,
        mean_weight: float,
        metrics: Sequence[Tensor],
        name: str,
    ):
        self.moments, self.betas, self.factor, self.mean_weight = moments, task_weights, factor, mean_weight
        self.metrics, self.dtype = metrics, moments[0].gram.dtype
        total = sum(task_weights)
        self.mean_metric = sum(
            (m * (b / total) for m, b in zip(metrics, task_weights, strict=True)), torch.zeros_like(metrics[0])
        )
        self._lower, failed = torch.linalg.cholesky_ex(self.mean_metric)
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
        self._means = [(own.total / own.rows).to(self.dtype) for own in moments]

    def rhs(self, anchor: Tensor, experts: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(anchor, dtype=self.dtype)
        for own, expert, beta, metric in zip(self.moments, experts, self.betas, self.metrics, strict=True):
            gap = expert.double() - anchor.double()
            toward = (gap @ own.gram.double() - own.drifted(expert)) / own.rows
            if self.mean_weight:
                mean = own.total / own.rows
                shared = gap @ mean - own.drifted_total(expert) / own.rows
                toward.addr_(shared, mean, alpha=self.mean_weight)
            total.addmm_(metric, toward.to(self.dtype), alpha=beta)
        return total

    def apply(self, z: Tensor) -> Tensor:
        """The left-hand side."""
        result = (self.mean_metric @ z).mul_(self.factor.ridge + self.factor.jitter)
        for own, mean, beta, metric in zip(self.moments, self._means, self.betas, self.metrics, strict=True):
            part = (z @ own.gram).div_(own.rows)
            if self.mean_weight:
                part.addr_(z @ mean, mean, alpha=self.mean_weight)
            result.addmm_(metric, part, alpha=beta)
        return result

    def precondition(self, residual: Tensor) -> Tensor:
        outer = torch.cholesky_solve(residual, self._lower)
        return self._factor.solve(outer)

    def solve(self, rhs: Tensor) -> tuple[Tensor, float]:
        """The solution, and the relative residual that is left."""
        z = torch.zeros_like(rhs)
        residual = rhs.clone()
        direction = ahead = self.precondition(residual)
        size = first = _dot(residual, ahead)
        for _ in range(STEPS):
            if size <= TOLERANCE[self.dtype] ** 2 * first:
                break
            image = self.apply(direction)
            step = size / _dot(direction, image)
            z.add_(direction, alpha=step)
            residual.sub_(image, alpha=step)
            ahead = self.precondition(residual)
            previous, size = size, _dot(residual, ahead)
            direction = ahead.add(direction, alpha=size / previous)
        return z, math.sqrt(max(0.0, size) / first) if first > 0 else 0.0


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))

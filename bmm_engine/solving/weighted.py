"""The solve in which errors of some outputs matter more than others, and for each task other ones.

    W* = argmin_W  sum_t beta_t tr( S_t (W - W_t) G_t (W - W_t)^T ) + lam || S^{1/2} (W - W_a) ||_F^2,

where S_t (out, out) is how much task t's predictions depend on the module's outputs (`bmm_engine.statistics.sensitivity`), and
S = sum_t beta_t S_t / sum_t beta_t. Its normal equations couple all outputs:

    sum_t beta_t S_t Z G_t + lam S Z = sum_t beta_t S_t R_t,    Z = W* - W_a,    R_t = (W_t - W_a) G_t

(the sequential merge has other R_t: see `bmm_engine.sequential.solve`). Where all S_t are equal it is the solve without metrics. They are solved by
conjugate gradients from that solution on, preconditioned by S Z (sum_t beta_t G_t + lam I), whose inverse is cheap. S_t comes as
level_t I + V_t V_t^T: a step multiplies by one matrix for what all outputs have in common, and by each G_t for the few directions V_t alone.

With Q (out, r) an orthonormal basis of all V_t the equations fall in two, exactly. Outside of it S_t is level_t, which one factor solves:

    (I - Q Q^T) Z = (I - Q Q^T) [sum_t beta_t level_t R_t] L^{-1},    L = sum_t beta_t level_t (G_t + ridge I),    ridge = lam / sum_t beta_t

Within it Q^T Z (r, in) is the same problem with Q^T V_t and Q^T R_t, and is solved so where r is well below out.

Of filters (`filters.py`), those that keep some directions Q_K are the same problem within them: Z = Y Q_K^T, with Q_K^T G_t Q_K and R_t Q_K in the
places of G_t and R_t, and no ridge where the filter is `truncated`. Gradient descent (`exponential`) has no such form.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, NotPositiveDefiniteError, NumericalWarning
from bmm_engine.ops.cholesky import solve_right
from bmm_engine.solving.filters import Filter, SpectralFactor
from bmm_engine.solving.moments import DenseMoment, Moment
from bmm_engine.solving.output_metric import OutputMetric
from bmm_engine.solving.solve import Factor
from bmm_engine.solving.task_weights import task_energy

TOLERANCE = {torch.float32: 3e-3, torch.float64: 1e-11}
"""Of the residual's norm, in the preconditioner's metric, beside that of the right-hand side. The objective's error goes with its square."""

STEPS = 300

NARROW = 0.5
"""Of the outputs: the most that the directions may span for the problem within them to be worth its setting up (measured)."""


def solve_weighted(
    anchor: Tensor,
    experts: Sequence[Tensor],
    moments: Sequence[Moment],
    factor: Factor | SpectralFactor,
    metrics: Sequence[OutputMetric],
    name: str,
) -> Tensor:
    """`W*` (out, in) in the anchor's dtype, of one module whose factor of `sum_t beta_t G_t + lam I` is there. Computed in float32, or float64 for
    such an anchor, but for the right-hand side, in float64. Raises and warns as `solve_toward`."""
    wide = anchor.double()
    toward = (moment.apply(expert.double() - wide) for expert, moment in zip(experts, moments, strict=True))
    dtype = torch.float64 if anchor.dtype == torch.float64 else torch.float32
    return solve_toward(toward, moments, factor, metrics, dtype, name).double().add_(wide).to(anchor.dtype)


def solve_toward(
    toward: Iterable[Tensor],
    moments: Sequence[Moment],
    factor: Factor | SpectralFactor,
    metrics: Sequence[OutputMetric],
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    """Z (out, in) for the tasks' R_t (out, in), float64, taken one by one. Computed in `dtype`.

    Warns (`NumericalWarning`) where the tolerance is not reached. Raises `NotPositiveDefiniteError`, and `ConfigError` for an exponential filter.
    """
    if isinstance(factor, SpectralFactor):
        return _solve_within(toward, moments, factor, metrics, dtype, name)
    like = torch.empty((), dtype=dtype, device=factor.lower.device)
    metrics = [metric.to(like) for metric in metrics]
    shared = _levels(moments, factor, metrics)
    lower = None
    if sum(metric.directions.shape[1] for metric in metrics) <= NARROW * metrics[0].outputs:
        # Without a ridge it may have none, where a task of level 0 alone sees an input; the whole problem has a solution nevertheless.
        factored, failed = torch.linalg.cholesky_ex(shared)
        lower = None if failed else factored
    if lower is None:
        system = _System(moments, factor, metrics, shared, dtype, name)
        change, left = system.solve(*system.sides(toward))
    else:
        change, left = _solve_split(toward, moments, factor, metrics, shared, lower, name)
    if not left <= TOLERANCE[dtype]:
        warnings.warn(
            f"{name}: the weighted solve stopped at a relative residual of {left:.1e} after {STEPS} steps; raise `alpha` or lower"
            " `sensitivity_share`.",
            NumericalWarning,
            stacklevel=2,
        )
    return change


def check_filter(filter: Filter) -> None:
    """Raise `ConfigError` for a filter that weighted outputs have no form of."""
    if not filter.restricts:
        raise ConfigError(
            f"filter {filter.kind!r} is for outputs that count alike: take 'ridge' or 'truncated', or leave out the sensitivities"
            " (output_weights: none)."
        )


def _solve_within(
    toward: Iterable[Tensor],
    moments: Sequence[Moment],
    factor: SpectralFactor,
    metrics: Sequence[OutputMetric],
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    """Z within the directions that a filter keeps: the problem of width K. Where it keeps none nothing moves."""
    check_filter(factor.filter)
    kept = factor.factors > 0
    basis = factor.eigenvectors[:, kept]
    if not basis.shape[1]:
        return torch.zeros(metrics[0].outputs, len(kept), dtype=dtype, device=basis.device)
    # A within them is diagonal: e, and the ridge.
    lower = factor.factors[kept].rsqrt().diag()
    inner = Factor(lower, 0.0 if factor.filter.kind == "truncated" else factor.ridge, 0.0, factor.task_weights)
    reduced = [DenseMoment(moment.apply(basis.mT.contiguous()) @ basis, module=name) for moment in moments]
    change = solve_toward((own @ basis for own in toward), reduced, inner, metrics, dtype, name)
    return change @ basis.mT.to(dtype)


def span(metrics: Sequence[OutputMetric]) -> Tensor:
    """An orthonormal basis Q (out, r) of all directions of the metrics, in their dtype."""
    directions = torch.cat([metric.directions for metric in metrics], 1)
    # Of R, since directions that tasks share (and zero ones) have to go.
    q, r = torch.linalg.qr(directions)
    u, sizes, _ = torch.linalg.svd(r)
    real = sizes > max(directions.shape) * torch.finfo(sizes.dtype).eps * sizes.max() if len(sizes) else sizes > 0
    return q @ u[:, real]


def _levels(moments: Sequence[Moment], factor: Factor, metrics: Sequence[OutputMetric]) -> Tensor:
    """`L = sum_t beta_t level_t (G_t + ridge I)` (in, in): what of the left-hand side all outputs have in common."""
    total = torch.zeros_like(factor.lower)
    ridge = _ridge(factor)
    for moment, beta, metric in zip(moments, factor.task_weights, metrics, strict=True):
        moment.add_to(total, beta * metric.level)
        total.diagonal().add_(beta * metric.level * ridge)
    return total


def _ridge(factor: Factor) -> float:
    return (factor.ridge + factor.jitter) / sum(factor.task_weights)


def _solve_split(
    toward: Iterable[Tensor],
    moments: Sequence[Moment],
    factor: Factor,
    metrics: Sequence[OutputMetric],
    shared: Tensor,
    lower: Tensor,
    name: str,
) -> tuple[Tensor, float]:
    """Z, and the relative residual within the metrics' directions. `lower`: the factor of L, which is `shared`."""
    basis = span(metrics)
    wide, level_side = basis.double(), torch.zeros((), dtype=torch.float64, device=shared.device)

    def within() -> Iterable[Tensor]:
        nonlocal level_side
        for own, beta, metric in zip(toward, factor.task_weights, metrics, strict=True):
            level_side = own.mul(beta * metric.level).add_(level_side)
            yield wide.mT @ own

    system = _System(moments, factor, [metric.within(basis) for metric in metrics], shared, basis.dtype, name)
    inner, left = system.solve(*system.sides(within()))
    outside = solve_right(lower, level_side.sub_(wide @ (wide.mT @ level_side))).to(basis.dtype)
    return outside.addmm_(basis, inner), left


def weighted_task_energy(moment: Moment, task_vector: Tensor, metric: OutputMetric) -> float:
    """`tr(S U G U^T)`: how much fine-tuning changed this module's output, in its metric. `task_vector` (out, in)."""
    seen = metric.directions.to(task_vector).mT @ task_vector
    return metric.level * task_energy(moment, task_vector) + task_energy(moment, seen)


class _System:
    """The normal equations of one module, as `sum_t beta_t S_t Z (G_t + ridge I) = ...`; `shared` is L of them."""

    def __init__(
        self,
        moments: Sequence[Moment],
        factor: Factor,
        metrics: Sequence[OutputMetric],
        shared: Tensor,
        dtype: torch.dtype,
        name: str,
    ):
        self.moments, self.factor, self.metrics = moments, factor, metrics
        self.dtype, self.betas = dtype, factor.task_weights
        total = sum(self.betas)
        self._ridge = _ridge(factor)
        mean_metric = sum(
            (m.dense().mul_(b / total) for m, b in zip(metrics, self.betas, strict=True)), torch.zeros(())
        )
        lower, failed = torch.linalg.cholesky_ex(mean_metric)
        if failed:
            raise NotPositiveDefiniteError(
                f"{name}: the mean of its output metrics is not positive definite (minor {int(failed)}). Give symmetric metrics with positive"
                " eigenvalues; `output_metrics` makes them of sensitivities.",
                module=name,
                pivot=int(failed),
                ridge=0.0,
            )
        self._level = shared.to(dtype)
        # To precondition with, inverses are exact enough, and faster than triangular solves.
        self._outer = torch.cholesky_inverse(lower)
        self._inner = torch.cholesky_inverse(factor.lower).to(dtype)

    def sides(self, toward: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """The right-hand side, and the solution for equal metrics."""
        total = alike = torch.zeros((), dtype=torch.float64, device=self._level.device)
        for own, beta, metric in zip(toward, self.betas, self.metrics, strict=True):
            alike = own.mul(beta).add_(alike)
            total = metric.times(own.to(self.dtype)).mul_(beta).add_(total)
        return total, self.factor.solve(alike).to(self.dtype)

    def apply(self, z: Tensor) -> Tensor:
        """The left-hand side."""
        result = z @ self._level
        for moment, beta, metric in zip(self.moments, self.betas, self.metrics, strict=True):
            seen = metric.directions.mT @ z
            result.addmm_(metric.directions, moment.apply(seen).add_(seen, alpha=self._ridge), alpha=beta)
        return result

    def precondition(self, residual: Tensor) -> Tensor:
        return self._outer @ residual @ self._inner

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

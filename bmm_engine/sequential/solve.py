"""Sequential BMM in closed form: aim the merged module, on the inputs it really gets, at what each expert gives on its own.

    W* = argmin_W  sum_t beta_t / n_t ||X~_t W^T - X_t W_t^T||_F^2 + lam ||W - W_a||_F^2
       = W_a + R A^{-1},   R = sum_t beta_t / n_t [ (W_t - W_a) G~_t - Q_t ],   A = sum_t beta_t G~_t / n_t + lam I

with G~_t and Q_t as in `moments.py`; ours, after arXiv 2605.12843. Without drift Q_t is 0, and it is plain BMM. With the drift of the residual stream
counted in (`ProjectedAccumulator`), the first norm is that of `S~_t + X~_t W^T - S_t - X_t W_t^T`.

With a `drift` share a in [0, 1] the target is `((1 - a) X~_t + a X_t) W_t^T`: of the drift, that of the stream too, the share a is corrected
(FeatCal, arXiv 2605.13030). 0 is RegMean++'s target (arXiv 2508.03121), 1 the one above.

A `hybrid` share g_t in [0, 1) counts the task vector U_t beside the rows of a task, by rows along it that do not drift:

    + sum_t beta_t g_t / (1 - g_t) tr(G~_t) / n_t || (W - W_t) U_t^T ||^2 / ||U_t||^2,

which adds to G~_t in A and in the first term of R what the hybrid Gram of plain BMM holds beside the data: directions that few rows do not fill.

An error that all rows of a task share does not average out over them, as others do, and shifts every prediction. A `mean_weight` gamma counts it once
more: `+ gamma sum_t beta_t || mean(X~_t W^T - X_t W_t^T) ||^2`, which adds a rank-1 term for each task to A and to R.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.sequential.moments import TaskMoments, squared
from bmm_engine.solving.filters import PLAIN, Filter, SpectralFactor
from bmm_engine.solving.moments import BLOCK_ROWS
from bmm_engine.solving.output_metric import OutputMetric
from bmm_engine.solving.solve import Factor, check_weights, inverses
from bmm_engine.solving.task_weights import choose_task_weights
from bmm_engine.solving.weighted import solve_toward


@dataclass(frozen=True)
class DriftSolution:
    """`weight` (out, in) in the anchor's dtype; `ridge` and `jitter` of its factor (inf and 0 for the anchor itself).

    `before`, `after`: per task `||X~ W^T - X W_t^T||_F^2 / n` of the anchor's weight and of the solution (with the target that was chosen in the
    place of X W_t^T); `change`: per task `||X U_t^T||_F^2 / n`, what fine-tuning changed there, or None where no `base` was given.
    """

    weight: Tensor
    ridge: float
    jitter: float
    task_weights: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    change: tuple[float, ...] | None


def solve_drift(
    anchor: Tensor,
    experts: Sequence[Tensor],
    moments: Sequence[TaskMoments],
    *,
    alpha: float,
    filter: str = "ridge",
    directions: int | float | str | None = None,
    task_weights: Sequence[float] | str | None = None,
    drift: float = 1.0,
    mean_weight: float = 0.0,
    hybrid: Sequence[float] | float = 0.0,
    metrics: Sequence[Tensor | OutputMetric] | None = None,
    base: Tensor | None = None,
    name: str = "module",
) -> DriftSolution:
    """The sequential MAP weight of one linear module (see the module's text), or of several that share their input, stacked along `out`.

    `anchor`, `experts[t]`, `base` (out, in), or [W | b] (out, in + 1) with moments that have a bias; `moments[t]`: `DriftAccumulator.moments()`, or
    `ProjectedAccumulator.moments()` with the same experts. `alpha`: relative ridge, `lam = alpha trace(A_0) / in`; inf gives the anchor.
    `task_weights`: None (all 1), a number per task, "energy" (`1 / ||X_t U_t^T||^2`, needs `base`) or "frobenius" (`1 / ||X~_t^T X~_t / n_t||_F`).
    `drift`: a above; `mean_weight`: gamma above; `hybrid`: g above, of each task or of all (needs `base`; a bias in it does not count). Computed in
    float64, rounded once. `filter`, `directions`: how far each eigenvector of A_0 is followed, as in `bmm_engine.Filter`; with `metrics` not
    "exponential".
    `metrics[t]`: S_t (out, out), positive definite, how much errors of the outputs count (`bmm_engine.solving.weighted`; `output_metrics` makes one
    of a sensitivity); then "energy" is `1 / ||X_t U_t^T S_t^{1/2}||^2`, and the solve is iterative, in the moments' dtype.

    Raises `ShapeMismatchError`, `NonFiniteWeightError`, `NonFiniteGramError`, `NotPositiveDefiniteError`, `ConfigError`.
    """
    experts, moments = list(experts), list(moments)
    weighing = None if metrics is None else [m if isinstance(m, OutputMetric) else OutputMetric.of(m) for m in metrics]
    if weighing is not None and len(weighing) != len(experts):
        raise ConfigError(f"{name}: {len(experts)} experts and {len(weighing)} metrics; give one for each expert.")
    if not experts or len(experts) != len(moments):
        raise ConfigError(
            f"{name}: {len(experts)} experts and {len(moments)} moments; give one for each expert, at least one."
        )
    check_weights(anchor, experts, name)
    for metric in weighing or ():
        if metric.outputs != anchor.shape[0]:
            raise ShapeMismatchError(f"{name}: a metric of {metric.outputs} outputs for {anchor.shape[0]}.")
    for own in moments:
        if own.width != anchor.shape[1]:
            raise ShapeMismatchError(f"{name}: moments of width {own.width} for a module of width {anchor.shape[1]}.")
    change = None
    if base is not None:
        change = tuple(m.energy([e - base]) / m.rows for m, e in zip(moments, experts, strict=True))
    energy = change
    if base is not None and weighing is not None:
        energy = tuple(
            m.weighted_energy(e - base, s) / m.rows for m, e, s in zip(moments, experts, weighing, strict=True)
        )
    betas = choose_task_weights(task_weights, energy, (own.norm for own in moments), len(experts), name)
    check_mean_weight(mean_weight)
    check_drift(drift)
    moments = [own.toward(drift) for own in moments]
    moments = _with_task_vectors(moments, experts, base, hybrid, name)
    factor = drift_factor(moments, betas, Filter(filter, directions), alpha=alpha, mean_weight=mean_weight, name=name)
    if weighing is None or factor is None:
        weight, before, after = solve_module(anchor, experts, moments, betas, factor, mean_weight)
    else:
        weight, before, after = solve_weighted_module(anchor, experts, moments, factor, mean_weight, weighing, name)
    ridge, jitter = (math.inf, 0.0) if factor is None else (factor.ridge, factor.jitter)
    return DriftSolution(weight, ridge, jitter, betas, tuple(before), tuple(after), change)


def _with_task_vectors(
    moments: Sequence[TaskMoments],
    experts: Sequence[Tensor],
    base: Tensor | None,
    hybrid: Sequence[float] | float,
    name: str,
) -> list[TaskMoments]:
    shares = [float(g) for g in hybrid] if isinstance(hybrid, Sequence) else [float(hybrid)] * len(moments)
    if len(shares) != len(moments):
        raise ConfigError(
            f"{name}: {len(shares)} hybrid shares for {len(moments)} experts; give one for each, or one for all."
        )
    if wrong := [g for g in shares if not 0 <= g < 1]:
        raise ConfigError(f"{name}: a hybrid share must be in [0, 1), not {wrong[0]}.")
    if not any(shares):
        return list(moments)
    if base is None:
        raise ConfigError(f"{name}: hybrid={hybrid!r} needs `base`, to form the task vectors.")
    return [own.with_task_vector(w - base, g) for own, w, g in zip(moments, experts, shares, strict=True)]


def check_mean_weight(value: float) -> None:
    """Raise `ConfigError` unless it is finite and >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"mean_weight must be a number >= 0, not {value!r}.")


def check_drift(value: float) -> None:
    """Raise `ConfigError` unless it is a share, in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"drift must be a number in [0, 1], the share of the drift that is corrected, not {value!r}.")


def drift_factor(
    moments: Sequence[TaskMoments],
    task_weights: Sequence[float],
    filter: Filter = PLAIN,
    *,
    alpha: float,
    mean_weight: float,
    name: str,
) -> Factor | SpectralFactor | None:
    """The factor of A, or what a filter has in its place, which modules that share their input share; None where `alpha` is inf. Raises as
    `factorize` does."""
    if alpha == math.inf:
        return None
    grams = [own.merged(mean_weight) for own in moments]
    (factor,) = inverses([grams], [task_weights], filter, alpha=alpha, names=[name], device=moments[0].gram.device)
    return factor


def solve_module(
    anchor: Tensor,
    experts: Sequence[Tensor],
    moments: Sequence[TaskMoments],
    task_weights: Sequence[float],
    factor: Factor | SpectralFactor | None,
    mean_weight: float,
) -> tuple[Tensor, list[float], list[float]]:
    """`W*` (out, in), and per task the squared misfit of the anchor and of `W*`, over n; by blocks of rows, which are independent.

    With E = W - W_t, `||X~ W^T - X W_t^T||^2 = tr(E G~ E^T) + 2 tr(E Q^T) + ||D W_t^T||^2`.
    """
    weight = torch.empty_like(anchor)
    before, after = [0.0] * len(experts), [0.0] * len(experts)
    for start in range(0, anchor.shape[0], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        own, parts = anchor[rows], [e[rows] for e in experts]
        residual = torch.zeros_like(own, dtype=torch.float64)
        drifted = []
        for t, (part, beta) in enumerate(zip(parts, task_weights, strict=True)):
            gap = part.double() - own.double()
            toward = gap @ moments[t].counted.double()
            drifted.append(moments[t].of(rows).drifted(part))
            residual.add_(toward.sub_(drifted[t]), alpha=beta / moments[t].rows)
            if mean_weight:
                inputs = moments[t].total
                shared = gap @ inputs - moments[t].of(rows).drifted_total(part)
                residual.addr_(shared, inputs, alpha=mean_weight * beta / moments[t].rows ** 2)
        solved = own if factor is None else factor.solve(residual).add_(own).to(anchor.dtype)
        weight[rows] = solved
        for t, part in enumerate(parts):
            constant = moments[t].of(rows).target_drift(part)
            for total, weights in ((before, own), (after, solved)):
                gap = weights - part
                total[t] += constant + squared(gap, moments[t].gram) + 2 * float((drifted[t] * gap).sum())
    for total in (before, after):
        total[:] = [max(0.0, value) / own.rows for value, own in zip(total, moments, strict=True)]
    return weight, before, after


def solve_weighted_module(
    anchor: Tensor,
    experts: Sequence[Tensor],
    moments: Sequence[TaskMoments],
    factor: Factor | SpectralFactor,
    mean_weight: float,
    metrics: Sequence[OutputMetric],
    name: str,
) -> tuple[Tensor, list[float], list[float]]:
    """The same where each task's errors count by its metric of the outputs; the misfits do not. Raises and warns as `solve_toward`."""

    def toward() -> Iterator[Tensor]:
        for own, expert in zip(moments, experts, strict=True):
            gap = expert.double() - anchor.double()
            part = (gap @ own.counted.double()).sub_(own.drifted(expert)).div_(own.rows)
            if mean_weight:
                mean = own.total / own.rows
                part.addr_(gap @ mean - own.drifted_total(expert) / own.rows, mean, alpha=mean_weight)
            yield part

    grams = [own.merged(mean_weight) for own in moments]
    change = solve_toward(toward(), grams, factor, metrics, moments[0].gram.dtype, name)
    solved = (anchor.double() + change.double()).to(anchor.dtype)
    before, after = (
        [own.misfit(weight, expert) / own.rows for expert, own in zip(experts, moments, strict=True)]
        for weight in (anchor, solved)
    )
    return solved, before, after


def relative_residuals(misfit: Sequence[float], change: Sequence[float]) -> list[float | None]:
    """Per task `||X~ W^T - X W_t^T|| / ||X U_t^T||` of squared norms; None where fine-tuning changed nothing."""
    return [math.sqrt(m / c) if c > 0 else None for m, c in zip(misfit, change, strict=True)]

"""Sequential BMM: the closed form that aims a merged module, on the inputs it really gets, at what each expert gives on its own.

In a merged network the inputs of a module come from merged modules below it, and drift away from those that the experts were measured on. With
X_t the rows that expert t reads, X~_t the rows that the merged network reads for the same tokens, and D_t = X~_t - X_t the drift:

    W* = argmin_W  sum_t beta_t / n_t ||X~_t W^T - X_t W_t^T||_F^2 + lam ||W - W_a||_F^2
       = W_a + R A^{-1},   R = sum_t beta_t / n_t [ (W_t - W_a) G~_t - W_t C_t ],   A = sum_t beta_t G~_t / n_t + lam I

    G~_t = X~_t^T X~_t,   C_t = D_t^T X~_t   (in, in; C_t is not symmetric)

The cross-moment is taken of the drift, not of X_t: what does not drift adds exactly nothing, so that without drift this is plain BMM to the last
bit, and small drifts keep their digits in float32. A third moment, D_t^T D_t, gives what there is to know of the fit without seeing a row again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, EmptyCalibrationError, NonFiniteGramError, ShapeMismatchError
from bmm_engine.moments import DenseMoment
from bmm_engine.ops.cross_gram import accumulate_cross_gram
from bmm_engine.ops.gram import accumulate_gram
from bmm_engine.solve import (
    Factor,
    BLOCK_ROWS,
    check_finite,
    check_task_weights,
    energy_weights,
    factorize,
    residual_of,
    task_energy,
)


@dataclass(frozen=True)
class DriftMoments:
    """One task's second moments at one input, as sums over `rows` rows: `gram` X~^T X~, `cross` D^T X~, `drift` D^T D, each (in, in)."""

    gram: Tensor
    cross: Tensor
    drift: Tensor
    rows: int
    name: str = "module"

    @property
    def width(self) -> int:
        return self.gram.shape[0]

    @cached_property
    def merged(self) -> DenseMoment:
        """`X~^T X~ / n`: of what the merged network reads."""
        return DenseMoment(self.gram, self.rows, module=self.name)

    def expert(self) -> DenseMoment:
        """`X^T X / n`: of what the expert reads, since X = X~ - D."""
        return DenseMoment(self.gram - self.cross - self.cross.mT + self.drift, self.rows, module=self.name)


class DriftAccumulator:
    """Adds up rows that an expert and the merged network read for the same tokens.

    Float32 rows and 16-bit ones accumulate in float32, float64 ones in float64; the sums of columns, for the biases, in float64.
    """

    def __init__(
        self, width: int, *, name: str = "module", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ):
        self.name = name
        self.rows = 0
        self._gram, self._cross, self._drift = (
            torch.zeros(width, width, dtype=dtype, device=device) for _ in range(3)
        )
        self._sum, self._drift_sum = (torch.zeros(width, dtype=torch.float64, device=device) for _ in range(2))

    @property
    def width(self) -> int:
        return self._gram.shape[0]

    def update(self, expert: Tensor, merged: Tensor, *, backend: str = "auto") -> DriftAccumulator:
        """Add rows (..., in) of the expert and of the merged network, in pairs; leading dimensions are flattened.

        Raises `ShapeMismatchError` (another width, unequal rows), `NonFiniteGramError` (whose rows, how many); then nothing was added.
        """
        if merged.shape != expert.shape or merged.shape[-1] != self.width:
            raise ShapeMismatchError(
                f"{self.name}: the expert reads {tuple(expert.shape)}, the merged network {tuple(merged.shape)}; both must have the same rows of"
                f" width {self.width}."
            )
        expert, merged = (rows.detach().reshape(-1, self.width) for rows in (expert, merged))
        if merged.shape[0] == 0:
            return self
        drift = merged - expert
        sums = [rows.sum(0, dtype=torch.float64) for rows in (merged, drift)]
        if not all(bool(torch.isfinite(s).all()) for s in sums):
            self._report(expert, merged)
        accumulate_cross_gram(self._cross, drift, merged, G=self._gram, backend=backend)
        accumulate_gram(self._drift, drift, backend=backend)
        self._sum += sums[0]
        self._drift_sum += sums[1]
        self.rows += merged.shape[0]
        return self

    def moments(self, *, with_bias: bool = False) -> DriftMoments:
        """The sums so far; `with_bias`: of [x, 1] (in + 1, in + 1), so that the bias is solved with the weight.

        Raises `EmptyCalibrationError` without rows.
        """
        if self.rows == 0:
            raise EmptyCalibrationError(
                f"{self.name}: no rows were measured; give calibration data that is not all padding."
            )
        if not with_bias:
            return DriftMoments(self._gram, self._cross, self._drift, self.rows, self.name)
        total, drift = self._sum.to(self._gram.dtype), self._drift_sum.to(self._gram.dtype)
        gram, cross, second = (torch.nn.functional.pad(m, (0, 1, 0, 1)) for m in (self._gram, self._cross, self._drift))
        gram[-1, :-1] = gram[:-1, -1] = total
        gram[-1, -1] = self.rows
        cross[:-1, -1] = drift  # the constant 1 does not drift: its own row stays zero
        return DriftMoments(gram, cross, second, self.rows, self.name)

    def _report(self, expert: Tensor, merged: Tensor) -> None:
        for whose, rows in (("the expert", expert), ("the merged network", merged)):
            count = int((~torch.isfinite(rows).all(-1)).sum())
            if count:
                raise NonFiniteGramError(
                    f"{self.name}: {count} of {rows.shape[0]} rows that {whose} reads there hold NaN or infinity; nothing was added. Check the"
                    " calibration batch, or run the models in float32.",
                    module=self.name,
                    count=count,
                )
        raise NonFiniteGramError(
            f"{self.name}: the sum of its input rows overflows; nothing was added. Run the models in float32.",
            module=self.name,
            count=0,
        )


@dataclass(frozen=True)
class InputRecord:
    """What happened at one input of the network: the modules solved there and, per expert as listed, its task weight and its relative residual
    `||X~ W^T - X W_t^T|| / ||X U_t^T||` with the anchor's weights and with the solved ones; None where fine-tuning changed nothing."""

    stage: str
    modules: tuple[str, ...]
    alpha: float
    ridge: float
    jitter: float
    task_weights: tuple[float, ...]
    before: tuple[float | None, ...]
    after: tuple[float | None, ...]


@dataclass(frozen=True)
class DriftSolution:
    """`weight` (out, in) in the anchor's dtype. `ridge`, `jitter` of the factor; the `task_weights` used.

    `before`, `after`: per task `||X~ W^T - X W_t^T||_F^2 / n` of the anchor's weight and of the solution; `change`: per task
    `||X U_t^T||_F^2 / n`, what fine-tuning changed there, or None where no `base` was given.
    """

    weight: Tensor
    ridge: float
    jitter: float
    task_weights: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    change: tuple[float, ...] | None


def relative_residuals(misfit: Sequence[float], change: Sequence[float]) -> list[float | None]:
    """Per task `||X~ W^T - X W_t^T|| / ||X U_t^T||` of squared norms; None where fine-tuning changed nothing."""
    return [math.sqrt(m / c) if c > 0 else None for m, c in zip(misfit, change, strict=True)]


def drift_task_weights(
    given: str | Sequence[float] | None, energies: Sequence[float] | None, tasks: int, name: str
) -> tuple[float, ...]:
    """Task weights by name or number, "energy" from the tasks' `energies`. Raises `ConfigError`."""
    if given is None or given == "none":
        return (1.0,) * tasks
    if given == "energy":
        if energies is None:
            raise ConfigError(f"{name}: task_weights='energy' needs `base`, to form the task vectors.")
        return energy_weights(energies)
    if isinstance(given, str):
        raise ConfigError(f"{name}: task_weights must be None, 'none', 'energy' or one number per task, not {given!r}.")
    weights = tuple(float(w) for w in given)
    check_task_weights(weights, tasks, name)
    return weights


def drift_energy(moments: DriftMoments, task_vectors: Iterable[Tensor]) -> float:
    """`||X U_t^T||_F^2 / n` of one task, summed over modules that share their input; task vectors (out, in)."""
    gram = moments.expert()
    return max(0.0, sum(task_energy(gram, u) for u in task_vectors))


def solve_drift(
    anchor: Tensor,
    experts: Sequence[Tensor],
    moments: Sequence[DriftMoments],
    *,
    alpha: float,
    task_weights: Sequence[float] | str | None = None,
    base: Tensor | None = None,
    name: str = "module",
) -> DriftSolution:
    """The sequential MAP weight of one linear module (see the module's text), or of several that share their input, stacked along `out`.

    `anchor`, `experts[t]`, `base` (out, in), or [W | b] (out, in + 1) with moments `with_bias`; `moments[t]`: `DriftAccumulator.moments()`.
    `alpha`: relative ridge, `lam = alpha trace(A_0) / in`; inf gives the anchor. `task_weights`: None (all 1), a number per task, or "energy"
    (`1 / ||X_t U_t^T||^2`, needs `base`). Computed in float64, rounded once.

    Raises `ShapeMismatchError`, `NonFiniteWeightError`, `NonFiniteGramError`, `NotPositiveDefiniteError`, `ConfigError`.
    """
    experts, moments = list(experts), list(moments)
    if not experts or len(experts) != len(moments):
        raise ConfigError(
            f"{name}: {len(experts)} experts and {len(moments)} moments; give one for each expert, at least one."
        )
    for t, expert in enumerate(experts):
        if expert.shape != anchor.shape:
            raise ShapeMismatchError(
                f"{name}: expert {t} has shape {tuple(expert.shape)}, the anchor {tuple(anchor.shape)}."
            )
    for own in moments:
        if own.width != anchor.shape[1]:
            raise ShapeMismatchError(f"{name}: moments of width {own.width} for a module of width {anchor.shape[1]}.")
    for what, weight in (("the anchor", anchor), *((f"expert {t}", e) for t, e in enumerate(experts))):
        check_finite(weight, f"{name} ({what})")
    change = None if base is None else [drift_energy(m, [e - base]) for m, e in zip(moments, experts, strict=True)]
    betas = drift_task_weights(task_weights, change, len(experts), name)
    factor = DriftFactor.of(moments, betas, alpha=alpha, name=name)
    weight, before, after = factor.solve(anchor, experts)
    return DriftSolution(
        weight, factor.ridge, factor.jitter, betas, before, after, None if change is None else tuple(change)
    )


@dataclass(frozen=True)
class DriftFactor:
    """What all modules that share an input share: the moments, and the factor of A (None where `alpha` is inf)."""

    moments: tuple[DriftMoments, ...]
    task_weights: tuple[float, ...]
    factor: Factor | None

    @classmethod
    def of(cls, moments: Sequence[DriftMoments], task_weights: Sequence[float], *, alpha: float, name: str) -> DriftFactor:
        """Raises as `factorize` does."""
        betas = tuple(map(float, task_weights))
        if alpha == math.inf:
            return cls(tuple(moments), betas, None)
        grams = [own.merged for own in moments]
        (factor,) = factorize([grams], [betas], alpha=alpha, names=[name], device=moments[0].gram.device)
        return cls(tuple(moments), betas, factor)

    @property
    def ridge(self) -> float:
        return math.inf if self.factor is None else self.factor.ridge

    @property
    def jitter(self) -> float:
        return 0.0 if self.factor is None else self.factor.jitter

    def solve(
        self, anchor: Tensor, experts: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[float, ...], tuple[float, ...]]:
        """`W*` (out, in), and per task the squared misfit of the anchor and of `W*`, over n; by blocks of rows, which are independent."""
        weight = torch.empty_like(anchor)
        before, after = [0.0] * len(experts), [0.0] * len(experts)
        grams = [own.merged for own in self.moments]
        for start in range(0, anchor.shape[0], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            own = anchor[rows]
            parts = [e[rows] for e in experts]
            drifted = [e.double() @ m.cross.double() / m.rows for e, m in zip(parts, self.moments, strict=True)]
            if self.factor is None:
                solved = own
            else:
                r = residual_of(own, parts, grams, self.task_weights)
                for product, beta in zip(drifted, self.task_weights, strict=True):
                    r.sub_(product, alpha=beta)
                solved = self.factor.solve(r).add_(own).to(anchor.dtype)
            weight[rows] = solved
            for t, (part, product) in enumerate(zip(parts, drifted, strict=True)):
                constant = _squared(part, self.moments[t].drift) / self.moments[t].rows
                before[t] += constant + self._moved(own, part, product, t)
                after[t] += constant + self._moved(solved, part, product, t)
        return weight, tuple(max(0.0, v) for v in before), tuple(max(0.0, v) for v in after)

    def _moved(self, weight: Tensor, expert: Tensor, product: Tensor, t: int) -> float:
        """The part of `||X~ W^T - X W_t^T||^2 / n` that depends on W: with E = W - W_t it is `tr(E G~ E^T) + 2 tr(E (W_t C)^T)`."""
        gap = weight - expert
        return _squared(gap, self.moments[t].gram) / self.moments[t].rows + 2 * float((product * gap).sum())


def _squared(rows: Tensor, second: Tensor) -> float:
    """`tr(rows S rows^T)`, in the dtype of S; it is only reported."""
    rows = rows.to(second.dtype)
    return float(((rows @ second) * rows).sum(dtype=torch.float64))

"""Stage 3: the closed-form MAP of one module, or of a batch of them.

    W* = argmin_W sum_t beta_t tr((W - W_t) G_t (W - W_t)^T) + lam ||W - W_a||_F^2
       = W_a + R A^{-1},   R = sum_t beta_t (W_t - W_a) G_t,   A = sum_t beta_t G_t + lam I       (arXiv 2605.12843)

Always in this residual form, by a Cholesky factor. Grams are stored in float32; the algebra is float64, because a ridge of `alpha` leaves a
condition number of up to `in / alpha`, which eats all seven digits of float32 at small ridges.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from bmm_engine.errors import (
    ConfigError,
    NonFiniteWeightError,
    NotPositiveDefiniteError,
    NumericalWarning,
    ShapeMismatchError,
)
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.ops.assemble import assemble
from bmm_engine.ops.cholesky import cholesky_, solve_right
from bmm_engine.ops.residual import residual
from bmm_engine.solving.filters import PLAIN, Filter, SpectralFactor
from bmm_engine.solving.moments import BLOCK_ROWS, DenseMoment, Moment
from bmm_engine.solving.task_weights import check_task_weights, choose_task_weights, frobenius_norm, task_energy

# Jitter, relative to the mean diagonal of A: tried in this order on the members of a batch that have no factor without it. The last ones
# cover the rounding of float32 Grams, whose zero eigenvalues come out as small negative ones.
JITTERS = (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)


@dataclass(frozen=True)
class Factor:
    """`A = L L^T` (in, in) of one group, with the ridge `lam` in it and the jitter that was needed (0 as a rule)."""

    lower: Tensor
    ridge: float
    jitter: float
    task_weights: tuple[float, ...]

    def solve(self, rhs: Tensor) -> Tensor:
        """`rhs A^{-1}` for `rhs` (rows, in)."""
        return solve_right(self.lower, rhs)


@dataclass(frozen=True)
class MapSolution:
    """`weight` (..., out, in) in the anchor's dtype; the ridge, jitter and task weights of each member of the batch."""

    weight: Tensor
    ridge: list[float] = field(default_factory=list)
    jitter: list[float] = field(default_factory=list)
    task_weights: list[tuple[float, ...]] = field(default_factory=list)


def relative_ridge(alpha: float, trace: float, width: int) -> float:
    """`lam = alpha * trace(A_0) / in`. Where all Grams are zero any ridge gives the anchor; `alpha` (or 1) itself is taken."""
    if not alpha >= 0:
        raise ConfigError(f"alpha must be >= 0 (inf for the anchor itself), not {alpha}.")
    return alpha * trace / width if trace > 0 else (alpha or 1.0)


def factorize(
    moments: Sequence[Sequence[Moment]],
    task_weights: Sequence[Sequence[float]],
    *,
    alpha: float | None = None,
    ridge: float | None = None,
    names: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> list[Factor]:
    """Assemble and factor `A = sum_t beta_t G_t + lam I` for each member of a batch of groups of one width.

    `moments[i][t]`, `task_weights[i][t]`: member i, task t. Give `alpha` (relative to the mean diagonal) or `ridge` (absolute `lam`).
    Members without a factor, and only they, are retried with growing jitter, which is reported by a `NumericalWarning` and returned.
    Raises `NotPositiveDefiniteError` (module, pivot, ridge tried), `ConfigError`.
    """
    names = names or [f"module {i}" for i in range(len(moments))]
    width = _check_members(moments, task_weights, alpha, ridge, names)
    a = torch.empty(len(moments), width, width, dtype=torch.float64, device=device)
    ridges, scales = [], []
    for member, own, betas, name in zip(a, moments, task_weights, names, strict=True):
        assemble_moments(member, own, betas)
        trace = float(member.diagonal().sum())
        lam = _ridge_of(alpha, ridge, trace, width, name)
        member.diagonal().add_(lam)
        ridges.append(lam)
        scales.append(trace / width + lam)
    lower, info = cholesky_(a)
    failed = info.tolist()
    factors = [Factor(lower[i], ridges[i], 0.0, tuple(map(float, task_weights[i]))) for i in range(len(moments))]
    for i in (i for i, pivot in enumerate(failed) if pivot):
        # The factorisation overwrote A; a failure is rare, so it is assembled again.
        assemble_again = partial(assemble_moments, a[i], moments[i], task_weights[i])
        again, jitter = _factor_with_jitter(assemble_again, ridges[i], scales[i], names[i])
        factors[i] = replace(factors[i], lower=again, jitter=jitter)
    return factors


def inverses(
    moments: Sequence[Sequence[Moment]],
    task_weights: Sequence[Sequence[float]],
    filter: Filter = PLAIN,
    *,
    alpha: float | None = None,
    ridge: float | None = None,
    names: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> Sequence[Factor | SpectralFactor]:
    """What stands for `A^{-1}` in each member's solve: Cholesky factors, as `factorize` makes and raises them, or, for any other filter than the
    plain ridge, `Q diag(f(e) / e) Q^T` of `A_0 = sum_t beta_t G_t = Q diag(e) Q^T`, decomposed in float64."""
    if filter.plain:
        return factorize(moments, task_weights, alpha=alpha, ridge=ridge, names=names, device=device)
    names = names or [f"module {i}" for i in range(len(moments))]
    width = _check_members(moments, task_weights, alpha, ridge, names)
    found = []
    for own, betas, name in zip(moments, task_weights, names, strict=True):
        a = assemble_moments(torch.empty(width, width, dtype=torch.float64, device=device), own, betas)
        lam = _ridge_of(alpha, ridge, float(a.diagonal().sum()), width, name)
        eigenvalues, eigenvectors = torch.linalg.eigh(a)
        factors = filter.factors(eigenvalues, lam)
        found.append(SpectralFactor(eigenvectors, factors, filter, lam, tuple(map(float, betas))))
    return found


def _check_members(
    moments: Sequence[Sequence[Moment]],
    task_weights: Sequence[Sequence[float]],
    alpha: float | None,
    ridge: float | None,
    names: Sequence[str],
) -> int:
    """The width of all members; raises what `factorize` documents."""
    if (alpha is None) == (ridge is None):
        raise ConfigError("give alpha (relative ridge) or ridge (absolute), and not both.")
    width = moments[0][0].width
    for own, betas, name in zip(moments, task_weights, names, strict=True):
        check_task_weights(betas, len(own), name)
        for moment in own:
            if moment.width != width:
                raise ShapeMismatchError(f"{name}: Grams of width {moment.width} and {width} in one solve.")
    return width


def _ridge_of(alpha: float | None, ridge: float | None, trace: float, width: int, name: str) -> float:
    lam = relative_ridge(alpha, trace, width) if alpha is not None else float(ridge or 0.0)
    if not (lam >= 0 and math.isfinite(lam)):
        raise ConfigError(f"{name}: the ridge must be finite and >= 0, not {lam}.")
    return lam


def residual_of(
    anchor: Tensor, experts: Sequence[Tensor], moments: Sequence[Moment], task_weights: Sequence[float]
) -> Tensor:
    """`R = sum_t beta_t (W_t - W_a) G_t` (out, in), float64."""
    resident = [moment.resident if isinstance(moment, DenseMoment) else None for moment in moments]
    grams = [gram.to(anchor.device) for gram in resident if gram is not None]
    if len(grams) == len(moments):
        weights = [beta / m.rows for beta, m in zip(task_weights, moments, strict=True) if isinstance(m, DenseMoment)]
        return residual(anchor, experts, grams, weights, out_dtype=torch.float64)
    wide = anchor.double()
    out = torch.zeros_like(wide)
    for expert, moment, beta in zip(experts, moments, task_weights, strict=True):
        if not beta:
            continue
        if isinstance(moment, DenseMoment):  # read from disk for each use: one at a time
            gram = moment.total().to(anchor.device)
            out.add_(residual(anchor, [expert], [gram], [beta / moment.rows], out_dtype=torch.float64))
        else:
            out.add_(moment.apply(expert.double() - wide), alpha=beta)
    return out


def overshot(anchor: Tensor, base: Tensor, prior: float) -> Tensor:
    """What a ridge pulls towards, `prior W_a + (1 - prior) W_0` (out, in): the anchor itself at 1, beyond it above (FeatCal, arXiv 2605.13030)."""
    return anchor if prior == 1 else base + prior * (anchor - base)


def solve_with_factor(
    anchor: Tensor, experts: Sequence[Tensor], moments: Sequence[Moment], factor: Factor | SpectralFactor
) -> Tensor:
    """`W* = W_a + R A^{-1}` (out, in) in the anchor's dtype, by blocks of rows: the rows of W are independent."""
    out = torch.empty_like(anchor)
    for start in range(0, anchor.shape[0], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        r = residual_of(anchor[rows], [e[rows] for e in experts], moments, factor.task_weights)
        out[rows] = factor.solve(r).add_(anchor[rows])
    return out


@accepts_dlpack
def solve_map(
    anchor: Tensor,
    experts: Sequence[Tensor] | Tensor,
    grams: Sequence[Tensor] | Sequence[Moment] | Tensor,
    *,
    alpha: float | None = None,
    ridge: float | None = None,
    filter: str = "ridge",
    directions: int | float | str | None = None,
    task_weights: Sequence[float] | str | None = None,
    base: Tensor | None = None,
    name: str = "module",
) -> MapSolution:
    """The MAP weight `W* = W_a + R A^{-1}` of one linear module, or of a batch of equal shape.

    `anchor` (out, in) or (batch, out, in); `experts[t]` of the same shape; `grams[t]` (in, in) or (batch, in, in), mean second moments.
    Modules that share their input are solved as one, stacked along `out`. Any float dtype; computed in float64, rounded once.
    `alpha` relative ridge (`lam = alpha trace(A_0) / in`; inf gives the anchor; 0 is RegMean, Jin et al. 2023) or `ridge` absolute.
    `task_weights`: None (all 1), a number per task, "energy" (`1 / tr(U_t G_t U_t^T)`, needs `base`) or "frobenius" (`1 / ||G_t||_F`).
    `filter`, `directions`: how far each eigenvector of A_0 is followed, as in `bmm_engine.Filter`: `W_a + R Q diag(f(e) / e) Q^T`.

    Raises `ShapeMismatchError`, `NonFiniteWeightError`, `NonFiniteGramError`, `NotPositiveDefiniteError`, `ConfigError`.
    """
    chosen = Filter(filter, directions)
    problem = map_problem(anchor, experts, grams, task_weights=task_weights, base=base, name=name)
    if alpha == math.inf:
        count = len(problem.names)
        return MapSolution(anchor.clone(), [math.inf] * count, [0.0] * count, problem.task_weights)
    factors = problem.inverses(chosen, alpha=alpha, ridge=ridge)
    solved = [solve_with_factor(*args) for args in zip(*problem.members, factors, strict=True)]
    weight = torch.stack(solved) if anchor.dim() == 3 else solved[0]
    return MapSolution(weight, [f.ridge for f in factors], [f.jitter for f in factors], problem.task_weights)


@dataclass(frozen=True)
class MapProblem:
    """The members of a batch of regressions (one, where the anchor is a matrix), each by itself and checked."""

    names: list[str]
    anchors: list[Tensor]
    experts: list[list[Tensor]]
    moments: list[list[Moment]]
    task_weights: list[tuple[float, ...]]

    @property
    def members(self) -> tuple[list[Tensor], list[list[Tensor]], list[list[Moment]]]:
        return self.anchors, self.experts, self.moments

    def inverses(
        self, filter: Filter, *, alpha: float | None, ridge: float | None
    ) -> Sequence[Factor | SpectralFactor]:
        """One for each member; raises as the function does."""
        device = self.anchors[0].device
        return inverses(
            self.moments, self.task_weights, filter, alpha=alpha, ridge=ridge, names=self.names, device=device
        )

    def factorize(self, *, alpha: float | None, ridge: float | None) -> list[Factor]:
        """One factor for each member; raises as `factorize` does."""
        device = self.anchors[0].device
        return factorize(self.moments, self.task_weights, alpha=alpha, ridge=ridge, names=self.names, device=device)


def map_problem(
    anchor: Tensor,
    experts: Sequence[Tensor] | Tensor,
    grams: Sequence[Tensor] | Sequence[Moment] | Tensor,
    *,
    task_weights: Sequence[float] | str | None,
    base: Tensor | None,
    name: str,
) -> MapProblem:
    """The arguments of `solve_map`, checked and taken apart; raises as it does."""
    experts, grams = list(experts), list(grams)
    batched = anchor.dim() == 3
    if not batched and anchor.dim() != 2:
        raise ShapeMismatchError(
            f"{name}: the anchor must be (out, in) or (batch, out, in), not {tuple(anchor.shape)}."
        )
    if not experts or len(experts) != len(grams):
        raise ConfigError(
            f"{name}: {len(experts)} experts and {len(grams)} Grams; give one Gram for each expert, at least one."
        )
    check_weights(anchor, experts, name)
    anchors = list(anchor) if batched else [anchor]
    members = [[e[i] if batched else e for e in experts] for i in range(len(anchors))]
    moments = [
        [as_moment(g, i if batched else None, anchor.shape[-1], name) for g in grams] for i in range(len(anchors))
    ]
    betas = []
    for i, (own, grams_of) in enumerate(zip(members, moments, strict=True)):
        start = None if base is None else (base[i] if batched else base).double()
        pairs = zip(grams_of, own, strict=True)
        energies = None if start is None else (task_energy(g, e.double() - start) for g, e in pairs)
        norms = (frobenius_norm(g, anchor.device) for g in grams_of)
        betas.append(choose_task_weights(task_weights, energies, norms, len(own), name))
    names = [f"{name}[{i}]" for i in range(len(anchors))] if batched else [name]
    return MapProblem(names, anchors, members, moments, betas)


def check_weights(anchor: Tensor, experts: Sequence[Tensor], name: str) -> None:
    """Raise `ShapeMismatchError` or `NonFiniteWeightError` unless all are finite and of the anchor's shape."""
    for t, expert in enumerate(experts):
        if expert.shape != anchor.shape:
            raise ShapeMismatchError(
                f"{name}: expert {t} has shape {tuple(expert.shape)}, the anchor {tuple(anchor.shape)}."
            )
    for what, weight in (("the anchor", anchor), *((f"expert {t}", e) for t, e in enumerate(experts))):
        check_finite(weight, f"{name} ({what})")


def check_finite(weight: Tensor, what: str) -> None:
    """Raise `NonFiniteWeightError` naming `what` and the count if `weight` holds NaN or infinity."""
    if not torch.isfinite(weight.sum(dtype=torch.float32)):
        count = int((~torch.isfinite(weight)).sum())
        if count:
            raise NonFiniteWeightError(
                f"{what}: {count} of {weight.numel()} values are NaN or infinite. The checkpoint is damaged or its training diverged; replace it."
            )


def as_moment(gram: Tensor | Moment, index: int | None, width: int, name: str) -> Moment:
    """A Gram (in, in), or member `index` of a batch of them, as a moment of the width asked for. Raises `ShapeMismatchError`."""
    if not isinstance(gram, Tensor):
        moment: Moment = gram
    else:
        matrix = gram if index is None else gram[index]
        if matrix.shape != (width, width):
            raise ShapeMismatchError(
                f"{name}: a Gram has shape {tuple(matrix.shape)}, the module needs ({width}, {width})."
            )
        moment = DenseMoment(matrix, module=name)
    if moment.width != width:
        raise ShapeMismatchError(f"{name}: a Gram has width {moment.width}, the module {width}.")
    return moment


def assemble_moments(a: Tensor, moments: Sequence[Moment], task_weights: Sequence[float]) -> Tensor:
    """`A_0 = sum_t beta_t G_t` into `a` (in, in)."""
    in_memory = [m.resident if isinstance(m, DenseMoment) else None for m in moments]
    totals = [t for t in in_memory if t is not None]
    if len(totals) == len(moments):
        rows = [m.rows for m in moments if isinstance(m, DenseMoment)]
        return assemble(totals, [beta / n for beta, n in zip(task_weights, rows, strict=True)], 0.0, out=a)
    a.zero_()
    for moment, beta in zip(moments, task_weights, strict=True):
        moment.add_to(a, beta)
    return a


def _factor_with_jitter(assemble: Callable[[], Tensor], ridge: float, scale: float, name: str) -> tuple[Tensor, float]:
    """The factor of one member that has none at `ridge`, with the least jitter of the ladder that gives one: (lower, jitter)."""
    for relative in JITTERS:
        jitter = relative * scale
        a = assemble()
        a.diagonal().add_(ridge + jitter)
        lower, info = cholesky_(a[None])
        pivot = int(info[0])
        if pivot == 0:
            warnings.warn(
                f"{name}: A was not positive definite at ridge {ridge:.3g}; jitter {jitter:.3g} was added. Use a larger alpha, or more"
                " calibration data.",
                NumericalWarning,
                stacklevel=3,
            )
            return lower[0], jitter
    raise NotPositiveDefiniteError(
        f"{name}: A = sum beta_t G_t + lam I has no Cholesky factor (leading minor {pivot}), even with ridge {ridge + jitter:.3g}. Use a larger"
        " alpha, or more calibration data.",
        module=name,
        pivot=pivot,
        ridge=ridge + jitter,
    )

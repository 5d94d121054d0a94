"""How far a solve follows the regression along each eigenvector of `A_0 = Q diag(e) Q^T`, between the anchor and the data.

    W = W_a + B diag(f(e) / e) Q^T,   B = R Q,   f(e) in [0, 1]:   f = 0 is the anchor, f = 1 the regression

    ridge        f = e / (e + lam)          the MAP under the prior N(W_a, I / lam) (arXiv 2605.12843): Tikhonov's filter
    exponential  f = 1 - exp(-e / lam)      gradient descent from the anchor for a time 1 / lam
    truncated    f = 1 where e > lam        the regression within the largest directions alone

`lam = alpha trace(A_0) / in`: inf is the anchor, 0 the regression of least norm, for each of them. `directions` keeps the K largest directions and
sets f = 0 beyond; where it is given, `truncated` takes exactly those, whatever lam is (but for inf). After arXiv 2606.07289, which solves WUDI's
problem so: there it is the exponential filter with the largest 65 % of the directions, or the truncated one with the participation ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError

KINDS = ("ridge", "exponential", "truncated")
COUNTS = ("participation", "gavish_donoho")


def directions_fault(value: object) -> str:
    """What is wrong with a value of `directions`; empty where nothing is."""
    if value is None or value in COUNTS:
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return ""
    if isinstance(value, float) and 0 < value <= 1:
        return ""
    return "must be a whole number >= 1, a share (0 < share <= 1, 1.0 for all), 'participation' or 'gavish_donoho'"


@dataclass(frozen=True)
class Filter:
    """`kind`: see the module's text. `directions`: None (all), how many at most (int >= 1), a share of the width (float in (0, 1], at least one
    direction), or "participation" or "gavish_donoho", which count them in the spectrum itself. Raises `ConfigError`."""

    kind: str = "ridge"
    directions: int | float | str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"filter must be 'ridge', 'exponential' or 'truncated', not {self.kind!r}.")
        if fault := directions_fault(self.directions):
            raise ConfigError(f"directions {fault}, not {self.directions!r}.")

    @property
    def restricts(self) -> bool:
        """Is it a MAP within the directions kept, so that other solves than by spectrum have one too?"""
        return self.kind != "exponential"

    @property
    def plain(self) -> bool:
        """Is it the MAP itself, which needs no spectrum?"""
        return self.kind == "ridge" and self.directions is None

    def factors(self, eigenvalues: Tensor, ridge: float) -> Tensor:
        """`f(e) / e` (in,), float64: what a coefficient of `B` is multiplied by. 0 where e is (see `with_mass`).

        `eigenvalues` e (in,), ascending, as `eigh` gives them; `ridge` lam >= 0, inf for the anchor.
        """
        if not ridge >= 0:
            raise ConfigError(f"the ridge must be >= 0 (inf for the anchor itself), not {ridge}.")
        e = eigenvalues.double()
        kept = with_mass(e)
        if self.directions is not None:
            kept[: len(e) - self.count(e)] = False
        elif self.kind == "truncated":
            kept &= e > ridge
        if ridge == math.inf:
            kept[:] = False
        if self.kind == "ridge":
            factors = 1 / (e + ridge)
        elif self.kind == "exponential":
            factors = -torch.expm1(-e / ridge) / e
        else:
            factors = 1 / e
        # Of a subnormal e: a finite number, as B is then next to 0, and 0 times infinity would be NaN.
        return torch.where(kept, factors, 0.0).clamp_(max=torch.finfo(torch.float64).max)

    def count(self, eigenvalues: Tensor) -> int:
        """K, how many of the largest directions are kept: of the width, where that is all."""
        width = len(eigenvalues)
        if self.directions is None:
            return width
        if self.directions == "participation":
            return participation_ratio(eigenvalues)
        if self.directions == "gavish_donoho":
            return gavish_donoho(eigenvalues)
        wanted = self.directions if isinstance(self.directions, int) else max(1, round(float(self.directions) * width))
        return min(wanted, width)


PLAIN = Filter()


@dataclass(frozen=True)
class SpectralFactor:
    """`Q diag(f(e) / e) Q^T` (in, in), which a filtered solve has in the place of `A^{-1}`: `eigenvectors` Q (in, in), `factors` (in,), both float64,
    as `filter` makes them of `ridge` lam. Nothing here needs a jitter. Used as a Cholesky factor is (`solve.Factor`)."""

    eigenvectors: Tensor
    factors: Tensor
    filter: Filter
    ridge: float
    task_weights: tuple[float, ...]
    jitter: float = 0.0

    def solve(self, rhs: Tensor) -> Tensor:
        """`rhs Q diag(f(e) / e) Q^T` for `rhs` (rows, in)."""
        return (rhs @ self.eigenvectors).mul_(self.factors) @ self.eigenvectors.mT


def with_mass(eigenvalues: Tensor) -> Tensor:
    """Which directions (in,) hold any mass: below `eps in max(e)` an eigenvalue is the rounding of a zero one, and there is nothing to follow."""
    e = eigenvalues.double()
    top = float(e.max()) if len(e) else 0.0
    return e > max(0.0, torch.finfo(torch.float64).eps * len(e) * top)


def participation_ratio(eigenvalues: Tensor) -> int:
    """`(sum s)^2 / sum s^2` of the singular values `s = sqrt(e)`, rounded: how many would hold all, were they equal. 0 where there is no mass."""
    e = eigenvalues.double()[with_mass(eigenvalues)]
    if not len(e):
        return 0
    s = (e / e.max()).sqrt()
    return max(1, round(float(s.sum() ** 2 / s.square().sum())))


def gavish_donoho(eigenvalues: Tensor, aspect: float | None = None) -> int:
    """How many singular values `s = sqrt(e)` exceed the optimal hard threshold for unknown noise, `omega(b) median(s)` (arXiv 1305.5870); at least
    one, 0 where there is no mass.

    `b` = `aspect` in (0, 1], rows by columns of the matrix that the s are of, or columns by rows; None: as many rows as s have mass, so 1 where all
    do. The median is of those with mass. `omega(1) = 2.858`, else the paper's approximation `0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43`.
    """
    e = eigenvalues.double()[with_mass(eigenvalues)]
    if not len(e):
        return 0
    b = len(e) / len(eigenvalues) if aspect is None else aspect
    if not 0 < b <= 1:
        raise ConfigError(f"gavish_donoho: the aspect must be in (0, 1], not {aspect}.")
    omega = 2.858 if b == 1 else 0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43
    s = e.sqrt()
    return max(1, int((s > omega * s.quantile(0.5)).sum()))

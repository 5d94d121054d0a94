"""RegMean: regression mean of linear modules (arXiv 2212.09849), and the normal equations that it shares with its successors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.domains import Share
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.errors import (
    ConfigError,
    NonFiniteGramError,
    NotPositiveDefiniteError,
    NumericalWarning,
    ShapeMismatchError,
)
from bmm_engine.ops.cholesky import cholesky_, solve_right

# Relative to the mean diagonal of A, tried in this order where A has no Cholesky factor without it. The first is about the root of float64's eps:
# in directions without mass the right-hand side's rounding errors come out divided by it. The others cover Grams summed in float32, whose zero
# eigenvalues come out as small negative ones.
_JITTERS = (1e-8, 1e-7, 1e-6, 1e-5)
# Refinements that take the jitter's bias out of the directions that have mass.
_REFINEMENTS = 2

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Shrink = Share
Ridge = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@anchor(scope="module", needs="grams", paper="Jin et al. 2023, arXiv 2212.09849")
def regmean(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    shrink: Shrink = 0.9,
    weight: PerExpert[Weight] = each(1.0),
    ridge: Ridge = 0.0,
) -> Tensor:
    """`W = (sum_t c_t W_t G~_t) (sum_t c_t G~_t)^{-1}`, `G~ = a G + (1 - a) diag G`: the least squares fit to what the experts' modules give.

    `weight`: c_t, one per expert. `shrink`: a, what the entries of G off the diagonal are multiplied by (0.9 is the paper's choice for all its
    models but T5, which got 0.1; 1 is the plain regression). `ridge`: pulls towards the mean expert, relative to the mean diagonal of the sum.
    Directions that no expert's data reach stay at the weighted mean of the experts.
    Raises `NotPositiveDefiniteError`, `NonFiniteGramError`, `ShapeMismatchError`, `ConfigError`.
    """
    return solve(normal_equations(experts, site.grams, weight, shrink, site.name), ridge, site.name).to(base.dtype)


@dataclass(frozen=True)
class NormalEquations:
    """`(W - center) A = rhs` in float64: `A = sum_t c_t G~_t` (in, in), `rhs = sum_t c_t (W_t - center) G~_t` (out, in).

    The unknown is the distance to `center`, so that what no Gram sees stays there, and equal experts give themselves exactly.
    """

    center: Tensor
    a: Tensor
    rhs: Tensor


def normal_equations(
    experts: Sequence[Tensor],
    grams: Sequence[Any],
    weight: Sequence[float],
    shrink: float,
    name: str,
    center: Tensor | None = None,
) -> NormalEquations:
    """Assemble them around `center`, by default the weighted mean of the experts (out, in).

    `grams[t]`: a matrix (in, in), or an object with `width` and `add_to(a, weight)`, which adds `weight G_t` to a matrix. One at a time is
    held in float64. Raises `ConfigError`, `ShapeMismatchError`, `NonFiniteGramError`.
    """
    if len(grams) != len(experts):
        raise ConfigError(
            f"{name}: {len(grams)} Grams for {len(experts)} experts; this rule needs one for each, measured by `bmm collect`."
        )
    if not any(weight):
        raise ConfigError(f"{name}: the weights {list(weight)} are all 0; give one expert a positive weight.")
    center = weighted_mean(experts, weight) if center is None else center.double()
    width = center.shape[1]
    a = center.new_zeros(width, width)
    rhs = torch.zeros_like(center)
    gram = torch.empty_like(a)
    for t, (expert, measured, c) in enumerate(zip(experts, grams, weight, strict=True)):
        if c:
            _load_gram(gram, measured, f"{name}, expert {t}")
            diagonal = gram.diagonal().clone()
            gram.mul_(shrink).diagonal().copy_(diagonal)
            a.add_(gram, alpha=c)
            rhs.addmm_(expert.double() - center, gram, alpha=c)
    return NormalEquations(center, a, rhs)


def solve(equations: NormalEquations, ridge: float, name: str) -> Tensor:
    """`center + rhs (A + lam I)^{-1}` (out, in) in float64, `lam = ridge * trace(A) / in`; without any mass in A the center itself.

    Where A has no Cholesky factor, the least jitter from 1e-8 to 1e-5 of its mean diagonal that gives one is added, which a
    `NumericalWarning` reports; directions with less mass than that stay at the center. Raises `NotPositiveDefiniteError` where none does.
    """
    scale = float(equations.a.diagonal().mean())
    if not scale > 0:
        return equations.center
    for jitter in (0.0, *_JITTERS):
        a = equations.a.clone()
        a.diagonal().add_((ridge + jitter) * scale)
        lower, info = cholesky_(a)
        pivot = int(info)
        if pivot == 0:
            solution = solve_right(lower, equations.rhs)
            if jitter:
                for _ in range(_REFINEMENTS):
                    left = equations.rhs - solution @ equations.a - (ridge * scale) * solution
                    solution += solve_right(lower, left)
                warnings.warn(
                    f"{name}: the sum of the Grams was not positive definite at ridge {ridge:.3g}; {jitter:.3g} of its mean diagonal was added."
                    " Use a shrink below 1, a ridge, or more calibration data.",
                    NumericalWarning,
                    stacklevel=2,
                )
            return solution.add_(equations.center)
    raise NotPositiveDefiniteError(
        f"{name}: the sum of the Grams has no Cholesky factor (leading minor {pivot}), even with {jitter:.3g} of its mean diagonal added. Use a"
        " larger ridge, a smaller shrink, or collect the Grams again.",
        module=name,
        pivot=pivot,
        ridge=(ridge + jitter) * scale,
    )


def weighted_mean(experts: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """`sum_t c_t W_t / sum_t c_t` in float64, exact where the experts are equal."""
    first = experts[0].double()
    mean, total = torch.zeros_like(first), math.fsum(weight)
    for expert, c in zip(experts, weight, strict=True):
        mean.add_(expert.double() - first, alpha=c / total)
    return mean.add_(first)


def _load_gram(gram: Tensor, measured: Any, what: str) -> None:
    """Fill `gram` (in, in), float64, with the matrix or moment `measured`."""
    width = measured.shape[-1] if isinstance(measured, Tensor) else measured.width
    if width != gram.shape[0] or (isinstance(measured, Tensor) and measured.shape != gram.shape):
        found = tuple(measured.shape) if isinstance(measured, Tensor) else (width, width)
        raise ShapeMismatchError(
            f"{what}: its Gram is {found}, the module needs {tuple(gram.shape)}; was it measured on another model?"
        )
    if isinstance(measured, Tensor):
        gram.copy_(measured)
    else:
        measured.add_to(gram.zero_(), 1.0)
    if not torch.isfinite(gram.sum()):
        count = int((~torch.isfinite(gram)).sum())
        raise NonFiniteGramError(
            f"{what}: its Gram holds {count} entries that are NaN or infinite. Collect it again.",
            module=what,
            count=count,
        )

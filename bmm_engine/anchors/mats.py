"""MaTS: matching models in their task subspaces by conjugate gradients (arXiv 2312.04339), with RegMean's objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.domains import NonNegative
from bmm_engine.anchors.regmean import Shrink, Weight, normal_equations, weighted_mean
from bmm_engine.anchors.settings import PerExpert, each


@anchor(scope="module", needs="grams", paper="Tam et al. 2023, arXiv 2312.04339")
def mats(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    steps: Annotated[int, Field(ge=0)] = 100,
    start: Literal["task_arithmetic", "average", "base", "zero"] = "task_arithmetic",
    scaling: float = 0.3,
    tolerance: NonNegative = 1e-5,
    shrink: Shrink = 1.0,
    weight: PerExpert[Weight] = each(1.0),
) -> Tensor:
    """Conjugate gradients on `W sum_t c_t G~_t = sum_t c_t W_t G~_t`, stopped early: RegMean's regression, near to where it started.

    `steps`: iterations at most. `start`: where from: task arithmetic with `scaling`, the mean expert, the base, or 0. `tolerance`: stop once the
    residual is this small relative to the right-hand side. `shrink`, `weight`: as in regmean. The weight is one long vector to the method: all
    rows take the same step length. Its K-FAC objective, which also needs Grams of gradients, is not offered.
    """
    match start:
        case "task_arithmetic":
            origin = base.double().clone()
            for expert in experts:
                origin.add_(expert.double() - base.double(), alpha=scaling)
        case "average":
            origin = weighted_mean(experts, weight)
        case "base":
            origin = base.double()
        case "zero":
            origin = base.double().new_zeros(base.shape)
    equations = normal_equations(experts, site.grams, weight, shrink, site.name, origin)
    return conjugate_gradients(equations.a, equations.rhs, origin, steps, tolerance).to(base.dtype)


def conjugate_gradients(a: Tensor, residual: Tensor, start: Tensor, steps: int, tolerance: float) -> Tensor:
    """Up to `steps` iterations on `X A = B` from `X = start` (out, in), where `residual = B - start A`; A symmetric semi-definite (in, in).

    Ends once `||B - X A|| < tolerance ||B||` (Frobenius), or when a direction has no curvature left, which only rounding leaves there.
    """
    x, r = start.clone(), residual.clone()
    enough = tolerance * float((residual + start @ a).norm())
    direction = r.clone()
    energy = float(r.square().sum())
    for _ in range(steps):
        if energy**0.5 < enough:
            break
        image = direction @ a
        curvature = float((direction * image).sum())
        if not curvature > 0:
            break
        x.add_(direction, alpha=energy / curvature)
        r.sub_(image, alpha=energy / curvature)
        previous, energy = energy, float(r.square().sum())
        direction.mul_(energy / previous).add_(r)
    return x

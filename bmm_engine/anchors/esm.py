"""ESM: merging in the directions in which fine-tuning moves a module's outputs (arXiv 2602.20208)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Model, Site, anchor
from bmm_engine.anchors.measured import measured_at, times
from bmm_engine.anchors.polar import polar_factor, task_vectors
from bmm_engine.anchors.spill import Spill

Power = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


@dataclass(frozen=True)
class EsmState:
    """M of each measured module, and its norm over the mean norm of the modules of its role."""

    merged: Spill
    ratios: Mapping[str, float]


def merge_modules(model: Model) -> EsmState:
    """Every M, kept in a temporary file in the dtype of the weights, and how their norms compare: a role is all modules whose names differ in the
    layer's number alone."""
    merged = Spill()

    def norm_of(site: Site) -> tuple[str, float] | None:
        if not site.linear or not site.grams:
            return None
        found = essential_merge(site)
        merged.put(site.name, found.to(site.base.dtype))
        return site.name, float(found.norm())

    norms = dict(filter(None, model.map(norm_of)))
    roles: dict[str, list[float]] = {}
    for name, norm in norms.items():
        roles.setdefault(_NUMBER.sub("*", name), []).append(norm)
    means = {role: math.fsum(own) / len(own) for role, own in roles.items()}
    return EsmState(merged, {name: norm / (means[_NUMBER.sub("*", name)] or 1.0) for name, norm in norms.items()})


@anchor(
    scope="model",
    linear=True,
    elementwise=True,
    needs="grams",
    reduce=merge_modules,
    paper="Li et al. 2026, arXiv 2602.20208",
)
def esm(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    state: EsmState,
    scaling: float = 1.0,
    spectrum_power: Power = 0.15,
    norm_power: Power = 2.0,
) -> Tensor:
    """`W = W_0 + scaling (||M|| / mean ||M||)^2 M`, `M = 2 mean(S_U) polar(U^) mean(S_V) polar(V^)`, from each task's main output shifts.

    U_t: the `r = floor(min(out, in) / T)` main directions of `X_t tau_t^T`, the eigenvectors of `tau_t G_t tau_t^T`, whose eigenvalues e give the
    weights `c = (e / mean e)^spectrum_power`, of mean 1. U^ stacks the `U_t diag(c_t)`; V^ the `diag(c_t) U_t^T tau_t`, times
    `(||tau_t|| / mean_s ||tau_s||)^norm_power`, and then each column j by `(||V^_j|| / mean ||V^_j||)^norm_power`. S_U, S_V: their min(shape)
    singular values. The last factor, to the `norm_power` too, compares a module with those of its role, of the same name in other layers.
    `scaling`: by validation in the paper. Directions in which a task's outputs do not move have no weight. Modules without Grams and all other
    tensors move by `scaling` times the mean task vector. The rank is that of the paper; the authors' code takes out / T, which is more than a task
    has room for where out > in.

    Diagnostics: `layer_scale`, the last factor. Raises `ConfigError`, `ShapeMismatchError`, `NonFiniteGramError`, `OutputWriteError`.
    """
    if site.name not in state.ratios:
        mean: Any = sum(task_vectors(base, experts)) / len(experts)
        return (base.double() + scaling * mean).to(base.dtype)
    layer = state.ratios[site.name] ** norm_power
    site.diagnostics["layer_scale"] = layer
    move = state.merged.get(site.name, base.device).double()
    return (base.double() + (scaling * layer) * move).to(base.dtype)


def essential_merge(site: Site) -> Tensor:
    """M of one module (out, in), in float64; zeros where there are fewer rows or columns than tasks."""
    spectrum_power, norm_power = site.parameters["spectrum_power"], site.parameters["norm_power"]
    taus = task_vectors(site.base, site.experts)
    rank = min(site.base.shape) // len(taus)
    sizes = [float(tau.norm()) for tau in taus]
    mean = math.fsum(sizes) / len(sizes)
    if not rank or not mean:
        return torch.zeros_like(taus[0])
    left, right = [], []
    for tau, gram, size in zip(taus, measured_at(site, "grams"), sizes, strict=True):
        weight, directions = _main_shifts(tau, gram, rank, spectrum_power, site.name)
        left.append(directions * weight)
        right.append((weight * (size / mean) ** norm_power)[:, None] * (directions.mT @ tau))
    u, u_mean = polar_factor(torch.cat(left, 1), complete=False)
    stacked = torch.cat(right)
    lengths = torch.linalg.vector_norm(stacked, dim=0)
    if (average := float(lengths.mean())) > 0:
        stacked = stacked * (lengths / average) ** norm_power
    vh, v_mean = polar_factor(stacked, complete=False)
    return (2 * u_mean * v_mean) * (u @ vh)


def _main_shifts(tau: Tensor, gram: Any, rank: int, power: float, name: str) -> tuple[Tensor, Tensor]:
    """The weights (r,) and, as columns, the leading eigenvectors (out, r) of `tau G tau^T`."""
    basis = None
    if tau.shape[0] > tau.shape[1]:  # all that it moves is in the span of its columns
        basis, tau = torch.linalg.qr(tau)
    shifts = times(tau, gram, name) @ tau.mT
    values, vectors = torch.linalg.eigh((shifts + shifts.mT) / 2)
    values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    real = values > len(shifts) * torch.finfo(values.dtype).eps * values[0].clamp(min=0)
    weight = torch.where(real, (values.clamp(min=0) / values.clamp(min=0).mean()) ** power, 0.0)
    weight = weight / weight.mean() if bool(real.any()) else torch.zeros_like(weight)
    return weight, vectors if basis is None else basis @ vectors

"""DOGE-TA: task arithmetic after a shared step by projected gradient descent (arXiv 2501.01230)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.adam import adam
from bmm_engine.anchors.contract import Model, Site, anchor
from bmm_engine.anchors.domains import PositiveShare
from bmm_engine.anchors.polar import singular_triples, task_triples
from bmm_engine.anchors.select import kth_smallest_magnitudes, over


def thresholds(model: Model) -> tuple[float, ...]:
    """Per task the magnitude from which on its entries are kept, over all linear modules of the model."""
    density = model.constant("density")
    tasks = next((len(site.experts) for site in model.sites()), 0)
    taus = over(model, lambda site: [[e - site.base for e in site.experts]] if site.linear else [])
    return kth_smallest_magnitudes(taus, [lambda n: n - int(n * density)] * tasks)


@anchor(scope="model", linear=True, reduce=thresholds, paper="Wei et al. 2025, arXiv 2501.01230")
def doge_ta(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    state: tuple[float, ...],
    scaling: float = 0.07,
    density: PositiveShare = 0.3,
    subspace: Annotated[int, Field(ge=1)] = 6,
    steps: Annotated[int, Field(ge=1)] = 400,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4,
) -> Tensor:
    """`W = W_0 + sum_t lam_t mask_t * (tau_t + Delta)` with `lam_t = scaling / ||tau_t||`, and one Delta for all tasks that makes them conflict less.

    Delta: `steps` of Adam at `learning_rate` from 0 on `sum_t sum_rows (sum_columns tau_t * (tau_t - sum_s lam_s (tau_s + Delta)))^2`, the
    gradient projected out of the min(out, in) / `subspace` strongest shared left directions of the tasks. mask_t: the `density` share of
    the largest entries of tau_t over all linear modules. Other tensors stay the base's. Slow by definition: two products with all task
    vectors for each step.
    """
    if not site.linear:
        return base.clone()
    taus = [expert - base for expert in experts]
    norms = [float(tau.double().norm()) for tau in taus]
    lam = [scaling / norm if norm else 0.0 for norm in norms]  # a task vector of zeros has no say
    directions = _shared_directions(site, min(base.shape) // subspace).to(base.dtype)
    delta = adam(
        torch.zeros_like(base),
        _projected_gradient(taus, lam, directions),
        steps=steps,
        learning_rate=learning_rate,
    )
    out = base.clone()
    for tau, own, threshold in zip(taus, lam, state, strict=True):
        out += torch.where(tau.abs().float() >= threshold, own * (tau + delta), 0.0)
    return out


def _shared_directions(site: Site, count: int) -> Tensor:
    """(out, <= count): the top left singular vectors of the tasks' own top min(out, in) / T ones side by side."""
    own = torch.cat([u for u, _, _ in task_triples(site, min(site.base.shape) // len(site.experts))], 1)
    # A single task's vectors are orthonormal: their order is the task's own.
    return own[:, :count] if len(site.experts) == 1 else singular_triples(own, count)[0]


def _projected_gradient(taus: Sequence[Tensor], lam: Sequence[float], directions: Tensor) -> Callable[[Tensor], Tensor]:
    """`(I - U U^T) grad` at Delta. Per task and row the objective has one number, `tau_t . (tau_t - sum_s lam_s tau_s) - total tau_t . Delta`, of
    which only the second part changes from step to step."""
    total = sum(lam)
    merged = torch.zeros_like(taus[0])
    for tau, own in zip(taus, lam, strict=True):
        merged.add_(tau, alpha=own)
    fixed = [torch.linalg.vecdot(tau, tau - merged) for tau in taus]  # (out,) each

    def gradient(delta: Tensor) -> Tensor:
        g = torch.zeros_like(delta)
        for tau, conflict in zip(taus, fixed, strict=True):
            conflict = conflict.sub(torch.linalg.vecdot(tau, delta), alpha=total)
            g.addcmul_(tau, conflict[:, None], value=-2 * total)
        return g.addmm_(directions, directions.mT @ g, alpha=-1)

    return gradient

"""SVC: singular values of a merge, calibrated against those of the experts along the same directions (arXiv 2602.05536)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.anchors.polar import singular_triples

# What a direction counts at least for a task, as in the authors' configurations.
FLOOR = 0.1
# Below this share of its squared norm, what a task vector has along a direction is what rounding left of nothing.
_LEAST_ENERGY = 1e-10


def svc(delta: Tensor, taus: Sequence[Tensor], *, floor: float = FLOOR) -> Tensor:
    """`delta = U S V^T` becomes `U diag(gamma S) V^T`, `gamma_r = T / sum_t max(s_rt, floor)`, where `s_rt = <u_r^T delta, a_rt> / ||a_rt||^2`
    says how many times the merge has what task t does along `u_r`, `a_rt = u_r^T tau_t`. What T tasks share and a sum has T times is so divided by T.

    So equal experts (and one) get their own task vector from any positive multiple of it of at least `floor`: their average stays, and so does the
    merge of one expert by a rule that returns it. Where a merge is much smaller than the experts along a direction, gamma is up to `1 / floor`.
    A task vector of zeros takes no part (FusionBench counts it with `floor`); one with less than 1e-10 of its energy along `u_r` counts there with
    `floor` (FusionBench: one with less than 1e-12 in all has its product divided by that).
    """
    used = [tau for tau in taus if bool(tau.any())]
    u, strength, vh = singular_triples(delta)
    if not used or not len(strength):
        return delta.clone()
    merged = strength[:, None] * vh  # (k, in): u_r^T delta
    counted = torch.zeros_like(strength)
    for tau in used:
        own = u.mT @ tau
        energy = own.square().sum(1)
        there = energy > _LEAST_ENERGY * tau.square().sum()
        ratio = (merged * own).sum(1) / torch.where(there, energy, 1.0)
        counted += torch.where(there, ratio, floor).clamp(min=floor)
    return (u * (strength * (len(used) / counted))) @ vh

"""LARV: a scale of the task vectors for each layer, from its weights alone (arXiv 2602.09413)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch
from torch import Tensor

# The scales of the third of the layers that scores least, of the middle one, and of the one that scores most.
TIERS = (0.8, 1.0, 1.2)
# A spread of conflicts below this is rounding.
_LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class Diagnosis:
    """Of one task vector of one module: how much richer the base's spectrum is than its own, and how far the two are from commuting."""

    contrast: float
    conflict: float


def diagnose(base: Tensor, tau: Tensor) -> Diagnosis | None:
    """`contrast = r(W_0) / r(tau)`, `r(A) = exp(-sum_j p_j ln p_j)` with `p_j = sigma_j^2 / ||A||^2` (effective rank), and
    `conflict = 1/2 (||W_0 tau^T - tau W_0^T|| + ||W_0^T tau - tau^T W_0||) / (||W_0|| ||tau||)`, of matrices (out, in); None where either is zero.
    """
    if base.shape[0] < base.shape[1]:
        base, tau = base.mT, tau.mT  # both halves of the conflict change places
    base, tau = base.double(), tau.double()
    size, own_size = float(base.norm()), float(tau.norm())
    if not size or not own_size:
        return None
    base, tau = base / size, tau / own_size
    gram, own, cross = base.mT @ base, tau.mT @ tau, base.mT @ tau  # (n, n), n the smaller side
    left = 2 * float((gram * own).sum() - (cross * cross.mT).sum())
    conflict = (math.sqrt(max(left, 0.0)) + float((cross - cross.mT).norm())) / 2
    return Diagnosis(_effective_rank(gram) / _effective_rank(own), conflict)


def layer_scales(found: Mapping[tuple[str, int, int], Sequence[Diagnosis]]) -> dict[tuple[str, int, int], float]:
    """Layer -> scale of its task vectors: `W_t` becomes `W_0 + scale tau_t`. A layer is (stack, l, layers of the stack), l from 0.

    With e and c the means of contrast and conflict over the layer's modules and tasks, and z(c) the distance of c from its mean over all layers in
    standard deviations, a layer scores `e sqrt((l + 1) / layers) / (1 + softplus(z(c)))`. The lowest third of the scores gets 0.8, the highest 1.2,
    the middle 1 (by the share of layers that score less, ties halved: a model of one layer is left as it is).

    Contrast, conflict and score follow what is public of the paper. It too has tiers of fixed values, and finds them more robust than a continuous
    map of the score; its values are not known here: these thirds and numbers, and the means over a layer's modules, are ours. One expert, or equal
    ones, are scaled like any others. A scale is for all tasks, so their order does not matter.
    """
    contrast = {layer: fmean(d.contrast for d in own) for layer, own in found.items() if own}
    conflict = {layer: fmean(d.conflict for d in own) for layer, own in found.items() if own}
    if not contrast:
        return {}
    middle, spread = fmean(conflict.values()), pstdev(conflict.values())
    score = {}
    for layer, value in contrast.items():
        _, index, count = layer
        z = (conflict[layer] - middle) / spread if spread > _LEAST_SPREAD else 0.0
        score[layer] = value * math.sqrt((index + 1) / count) / (1 + math.log1p(math.exp(-abs(z))) + max(z, 0.0))
    return {layer: _tier(own, list(score.values())) for layer, own in score.items()}


def _tier(score: float, scores: Sequence[float]) -> float:
    less, equal = sum(other < score for other in scores), sum(other == score for other in scores)
    return TIERS[min(int(3 * (less + equal / 2) / len(scores)), 2)]


def _effective_rank(gram: Tensor) -> float:
    """Of a matrix of norm 1, by its Gram on the smaller side."""
    energy = torch.linalg.eigvalsh(gram).clamp(min=0)
    return math.exp(-float(torch.xlogy(energy, energy).sum()))

"""Subspace boosting: the weak directions of a merge raised to the strength of its main ones (arXiv 2506.16506)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.anchors.polar import singular_triples

# Share of the sum of singular values that the directions above the threshold make up, as in the authors' code.
SHARE = 0.01


def subspace_boost(delta: Tensor, taus: Sequence[Tensor], *, share: float = SHARE) -> Tensor:
    """`delta = U S V^T` becomes `U max(S, S_k) V^T`, k the first at which `S_1 + ... + S_k` is at least `share` of the sum of S.

    The experts play no part. With the small share of the authors k is often 1, and all directions get the strength of the first. One expert is
    boosted like any other merge. Directions that the merge lacks (of low rank, as of a few adapters) are not made up.
    """
    u, strength, vh = singular_triples(delta)
    if not len(strength):
        return delta.clone()
    reached = torch.cumsum(strength, 0) >= share * strength.sum()
    threshold = strength[int(reached.int().argmax())]
    return (u * strength.clamp(min=threshold)) @ vh

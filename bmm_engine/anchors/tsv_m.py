"""TSV-M: merging by decorrelated task singular vectors (arXiv 2412.00081)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.domains import Rank
from bmm_engine.anchors.polar import task_subspace


@anchor(scope="module", others="scaled", paper="Gargiulo et al. 2025, arXiv 2412.00081")
def tsv_m(
    base: Tensor, experts: Sequence[Tensor], *, site: Site, scaling: float = 1.0, rank: Rank | None = None
) -> Tensor:
    """Stack each task's top `r = floor(min(out, in) / T)` singular triples, orthogonalise: `W = W_0 + scaling polar(U^) diag(S^) polar(V^)`.

    `scaling`: of the merged task vector (1 in FusionBench, by validation in the paper). `rank`: r, where that is less. A matrix with fewer rows or
    columns than there are tasks has r = 0 and stays the base's, as with the authors. Directions in which a task vector is zero are left out, and
    directions that tasks share exactly count once; the authors' code fills both with the SVD's null vectors, which mean nothing.
    """
    room = min(base.shape) // len(experts)
    u, strength, vh = task_subspace(site, room if rank is None else min(rank, room))
    return (base.double() + scaling * ((u * torch.cat(strength)) @ vh)).to(base.dtype)

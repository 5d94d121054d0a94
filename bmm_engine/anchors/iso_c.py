"""Iso-C: isotropic merging in the common subspace (arXiv 2502.04959)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.polar import polar_factor, task_vectors


@anchor(scope="module", others="scaled", paper="Marczak et al. 2025, arXiv 2502.04959")
def iso_c(base: Tensor, experts: Sequence[Tensor], *, scaling: float = 1.0) -> Tensor:
    """`sum_t tau_t = U S V^T`, `W = W_0 + scaling mean(S) U V^T`: every direction of the summed task vectors gets the same strength.

    `scaling`: by validation in the paper (0.9 to 1.5 for full fine-tunes; LoRA needs 3.5 to 4.5). A sum that is rank-deficient is completed to
    min(out, in) directions with null vectors of the SVD, as the authors' code does.
    """
    polar, strength = polar_factor(sum(task_vectors(base, experts)))  # type: ignore[arg-type]
    return (base.double() + (scaling * strength) * polar).to(base.dtype)

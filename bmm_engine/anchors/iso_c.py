"""Iso-C: isotropic merging in the common subspace (arXiv 2502.04959)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.anchors.contract import anchor

# Below this ratio of singular values the eigenvalues of the small Gram no longer resolve them, and an SVD is taken.
_GRAM_RESOLUTION = 1e-5


@anchor(scope="module", paper="Marczak et al. 2025, arXiv 2502.04959")
def iso_c(base: Tensor, experts: Sequence[Tensor], *, scaling: float = 1.0) -> Tensor:
    """`sum_t tau_t = U S V^T`, `W = W_0 + scaling mean(S) U V^T`: every direction of the summed task vectors gets the same strength."""
    total = torch.zeros_like(base)
    for expert in experts:
        total += expert - base
    polar, singular_mean = polar_factor(total)
    return base + (scaling * singular_mean) * polar


def polar_factor(matrix: Tensor) -> tuple[Tensor, float]:
    """`(U V^T, mean(S))` of `matrix = U S V^T` (out, in), in its dtype; computed in float64.

    By an eigendecomposition of the smaller Gram: with `P = U V^T`, `mean(S) = <P, matrix> / min(out, in)`. A matrix that is rank-deficient to
    working precision goes through the SVD, which completes the factor in its null space as the paper's code does.
    """
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().mT
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    singular = values.clamp(min=0).sqrt()
    if float(singular[-1]) == 0:
        return torch.zeros_like(matrix), 0.0
    if float(singular[0]) > _GRAM_RESOLUTION * float(singular[-1]):
        polar = (vectors / singular) @ (vectors.mT @ wide)
    else:
        u, singular, vh = torch.linalg.svd(wide, full_matrices=False)
        polar = u @ vh
    polar = polar if matrix.shape[0] <= matrix.shape[1] else polar.mT
    return polar.to(matrix.dtype), float(singular.mean())

"""Polar factors and leading singular triples, in float64: what the subspace rules are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bmm_engine.anchors.contract import Site

# Below this ratio of singular values the eigenvalues of the small Gram no longer resolve them, and an SVD is taken.
GRAM_RESOLUTION = 1e-5


def polar_factor(matrix: Tensor, *, complete: bool = True) -> tuple[Tensor, float]:
    """`(U V^T, mean(S))` of `matrix = U S V^T` (out, in); the factor in float64, the mean over min(out, in) values.

    By an eigendecomposition of the smaller Gram, `U V^T = (A A^T)^{-1/2} A`: on a CPU faster than an SVD, than dynamically weighted Halley by
    Cholesky and than scaled Newton, and right to 1e-6 or better down to `GRAM_RESOLUTION`; what is conditioned worse goes through the SVD.
    A rank-deficient matrix has no unique factor: `complete` takes the null vectors that the SVD happens to give, as the authors' code of
    Iso and TSV does; else `U V^T` is restricted to the range, which depends on nothing but the matrix. A zero matrix gives zeros.
    """
    wide = _wide(matrix)
    scale = float(wide.abs().max()) if wide.numel() else 0.0
    if scale == 0:
        return torch.zeros_like(matrix, dtype=torch.float64), 0.0
    wide = wide / scale  # the Gram of very large or small entries would leave float64's range
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    singular = values.clamp(min=0).sqrt()
    if float(singular[0]) > GRAM_RESOLUTION * float(singular[-1]):
        polar = ((vectors / singular) @ vectors.mT) @ wide
    else:
        u, singular, vh = torch.linalg.svd(wide, full_matrices=False)
        rank = len(singular) if complete else _rank(singular, wide.shape)
        polar = u[:, :rank] @ vh[:rank]
    return _like(polar, matrix), scale * float(singular.mean())


def singular_triples(matrix: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest singular triples of `matrix` (out, in), or all: U (out, k), S (k,) descending, Vh (k, in), in float64.

    Only directions that the matrix has, so k may be less: a null vector is whatever an SVD happens to give, and means nothing.
    Through the smaller Gram where that resolves all that is asked for, which costs a third of an SVD.
    """
    wide = _wide(matrix)
    count = wide.shape[0] if count is None else min(count, wide.shape[0])
    scale = float(wide.abs().max()) if wide.numel() else 0.0
    if scale == 0 or count == 0:
        rows, columns = matrix.shape
        return wide.new_zeros(rows, 0), wide.new_zeros(0), wide.new_zeros(0, columns)
    wide = wide / scale
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    if float(values[-count]) > GRAM_RESOLUTION**2 * float(values[-1]):
        u = vectors[:, -count:].flip(1)
        vh = u.mT @ wide
        singular = torch.linalg.vector_norm(vh, dim=1)
        vh /= singular[:, None]
    else:
        u, singular, vh = torch.linalg.svd(wide, full_matrices=False)
        count = min(count, _rank(singular, wide.shape))
        u, singular, vh = u[:, :count], singular[:count], vh[:count]
    singular = singular * scale
    return (u, singular, vh) if matrix.shape[0] <= matrix.shape[1] else (vh.mT, singular, u.mT)


def task_vectors(base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    """`W_t - W_0` in float64: exact for inputs of up to 32 bits, where float32 would lose digits of a small difference."""
    start = base.double()
    return [expert.double() - start for expert in experts]


def task_triples(site: Site, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`singular_triples` of each task vector at `site`; of one known as a product (LoRA) from its factors."""
    low_rank = low_rank_of(site)
    found = []
    for expert, product in zip(site.experts, low_rank, strict=True):
        if product is None:
            found.append(singular_triples(expert.double() - site.base.double(), count))
        else:
            u, s, vh = product.svd()
            kept = min(count, _rank(s, product.shape))
            found.append((u[:, :kept], s[:kept], vh[:kept]))
    return found


def task_subspace(site: Site, rank: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """TSV-M's: the top `rank` triples of all task vectors stacked and orthogonalised, U (out, p), each task's singular values, V^T (p, in).

    A task vector of lower rank has fewer; directions that tasks share exactly come out shorter than 1, so that they count once in their sum.
    """
    left, strength, right = zip(*task_triples(site, rank), strict=True)
    u, _ = polar_factor(torch.cat(left, 1), complete=False)
    vh, _ = polar_factor(torch.cat(right, 0), complete=False)
    return u, list(strength), vh


def low_rank_of(site: Site) -> Sequence[Any]:
    """One entry for each expert: its task vector as a product, or None."""
    return site.low_rank if site.low_rank else [None] * len(site.experts)


def _rank(singular: Tensor, shape: Sequence[int]) -> int:
    return int((singular > max(shape) * torch.finfo(singular.dtype).eps * singular[0]).sum()) if len(singular) else 0


def _wide(matrix: Tensor) -> Tensor:
    return matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().mT


def _like(wide: Tensor, matrix: Tensor) -> Tensor:
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.mT

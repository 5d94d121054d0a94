"""Iso-CTS: isotropic merging in common and task-specific subspaces (arXiv 2502.04959)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.domains import Share
from bmm_engine.anchors.polar import polar_factor, singular_triples, task_vectors


@anchor(scope="module", others="scaled", paper="Marczak et al. 2025, arXiv 2502.04959")
def iso_cts(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    scaling: float = 1.0,
    common_fraction: Share = 0.8,
) -> Tensor:
    """Iso-C with the weakest common directions replaced by each task's own: `W = W_0 + scaling mean(S^) polar(U^) polar(V^)`.

    U^, S^, V^ hold the top `k` triples of `sum_t tau_t` (`U_k`) and, per task, the top `s` of `(I - U_k U_k^T) tau_t`, with
    `k + T s = min(out, in)`. `common_fraction`: about k / min(out, in), rounded so that the tasks share the rest evenly. `scaling`: as in
    Iso-C. Where the stack is rank-deficient it is completed as in Iso-C.
    """
    small, tasks = min(base.shape), len(experts)
    own = min(round((small - int(common_fraction * small)) / tasks), small // tasks)
    common = small - tasks * own
    taus = task_vectors(base, experts)
    u, s, vh = singular_triples(sum(taus), common)  # type: ignore[arg-type]
    parts = [_outside(u, tau, own) for tau in taus] if own else []
    stack = torch.cat([*(p[0] for p in parts), u], 1), torch.cat([*(p[2] for p in parts), vh], 0)
    strength = float(torch.cat([*(p[1] for p in parts), s]).sum()) / max(small, 1)
    left, right = (polar_factor(_padded(part, small, dim))[0] for dim, part in ((1, stack[0]), (0, stack[1])))
    return (base.double() + (scaling * strength) * (left @ right)).to(base.dtype)


def _outside(common: Tensor, tau: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The top triples of `(I - U U^T) tau`; in a basis of the complement where that is the smaller problem."""
    rows, columns = tau.shape
    if rows > columns:
        return singular_triples(tau - common @ (common.mT @ tau), count)
    complement = torch.linalg.qr(common, mode="complete").Q[:, common.shape[1] :]
    u, s, vh = singular_triples(complement.mT @ tau, count)
    return complement @ u, s, vh


def _padded(part: Tensor, size: int, dim: int) -> Tensor:
    """Zeros in the place of directions that do not exist, so that the polar factor has all `size` of them."""
    missing = size - part.shape[dim]
    shape = (part.shape[0], missing) if dim == 1 else (missing, part.shape[1])
    return torch.cat([part, part.new_zeros(shape)], dim)

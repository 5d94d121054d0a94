"""OPCM: continual merging by orthogonal projection, one expert after the other (arXiv 2501.09522)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Model, Site, anchor
from bmm_engine.anchors.polar import singular_triples
from bmm_engine.anchors.spill import Spill


@dataclass(frozen=True)
class OpcmState:
    """What `S_T` is multiplied by, and, of linear modules, `S_T` itself: its T - 1 SVDs are not done twice."""

    factor: float
    sums: Spill


def accumulate_model(model: Model) -> OpcmState:
    """One pass: `S_T` of each tensor, and the norms over the whole model. Writes the linear modules' weights once to a temporary file."""
    sums = Spill()

    def measure(site: Site) -> list[float]:
        """Squared norms: of each task vector, and of S_T."""
        total = _accumulate(site)
        if site.linear and len(site.experts) > 1:
            sums.put(site.name, total.to(site.base.dtype))
        taus = (expert.double() - site.base.double() for expert in site.experts)
        return [float(tau.square().sum()) for tau in (*taus, total)]

    totals = [sum(own) for own in zip(*model.map(measure), strict=True)]
    return OpcmState(mean_norm_factor(totals[:-1], totals[-1]) if totals else 0.0, sums)


@anchor(
    scope="model", linear=True, reduce=accumulate_model, symmetric=False, paper="Tang et al. 2025, arXiv 2501.09522"
)
def opcm(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    state: OpcmState,
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.5,
) -> Tensor:
    """`S_t = S_{t-1} + (tau_t outside what S_{t-1} uses)`, `W = W_0 + (mean_t ||tau_t|| / ||S_T||) S_T`, the experts in the given order.

    For a linear module, with `S_{t-1} = U S V^T`, what is left out of tau_t is its part in the span of the first k pairs (u_i, v_j), those
    before the sum of singular values passes a share `alpha` of their total, and along each single pair (u_j, v_j). Every other
    tensor takes all of tau_t. The norms are those of the whole model; the authors rescale after every expert, which changes no direction,
    and so comes to the same. A pair without a singular value has no direction, and nothing is left out along it.
    """
    total = state.sums.get(site.name, base.device).double() if site.name in state.sums else _accumulate(site)
    return (base.double() + state.factor * total).to(base.dtype)


def add_expert(total: Tensor, tau: Tensor, alpha: float, linear: bool) -> Tensor:
    """`S_t` from `S_{t-1}` and tau_t, both float64."""
    if not linear:
        return total + tau
    u, s, vh = singular_triples(total)
    if not len(s):
        return total + tau
    beyond = s.cumsum(0) > alpha * s.sum()
    k = int(beyond.int().argmax())
    seen = u.mT @ tau  # (rank, in)
    used = (seen * vh).sum(1, keepdim=True) * vh
    used[:k] = (seen[:k] @ vh[:k].mT) @ vh[:k]
    return total + tau - u @ used


def mean_norm_factor(squares: Sequence[float], merged: float) -> float:
    """`mean_t ||tau_t|| / ||S_T||` from the squared norms over the whole model; 0 where S_T is zero."""
    return sum(square**0.5 for square in squares) / len(squares) / merged**0.5 if merged else 0.0


def _accumulate(site: Site) -> Tensor:
    total: Tensor | None = None
    for expert in site.experts:
        tau = expert.double() - site.base.double()
        total = tau if total is None else add_expert(total, tau, site.parameters["alpha"], site.linear)
    assert total is not None
    return total

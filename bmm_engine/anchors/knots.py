"""KnOTS: merge in the basis that the task vectors share (arXiv 2410.19735)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bmm_engine.anchors.contract import Model, Site, anchor
from bmm_engine.anchors.domains import PositiveShare
from bmm_engine.anchors.polar import low_rank_of, singular_triples, task_vectors
from bmm_engine.anchors.select import kth_smallest_magnitudes, over
from bmm_engine.anchors.spill import Spill
from bmm_engine.ops.blend import blend

# Singular values up to this, absolute as in the authors' code, are no part of the shared basis.
_SUPPORT = 1e-5
_DENSITY = {"ties": 0.2, "dare_ties": 0.9}


@dataclass(frozen=True)
class KnotsState:
    """Per task the magnitude from which on coordinates are kept; the sign of coordinates without a majority; each linear module's basis."""

    thresholds: tuple[float, ...]
    majority: float
    bases: Spill


def elect(model: Model) -> KnotsState:
    """Bases, thresholds and the majority sign, over the coordinates of the whole model. Writes the bases once to a temporary file."""
    bases = Spill()
    tasks = next((len(site.experts) for site in model.sites()), 0)
    density = model.constant("density")
    thresholds = (0.0,) * tasks
    if model.constant("combine") == "ties":
        share = _DENSITY["ties"] if density is None else density
        thresholds = kth_smallest_magnitudes(
            over(model, lambda site: [_coordinates(site, bases)]), [lambda n: n - int(n * share)] * tasks
        )
    balance = sum(model.map(lambda site: _balance(_kept(site, _coordinates(site, bases), thresholds))))
    return KnotsState(thresholds, 1.0 if balance > 0 else -1.0, bases)


@anchor(scope="model", linear=True, reduce=elect, paper="Stoica et al. 2025, arXiv 2410.19735")
def knots(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    state: KnotsState,
    scaling: float = 0.6,
    combine: Literal["ties", "dare_ties"] = "ties",
    density: PositiveShare | None = None,
    seed: int = 0,
) -> Tensor:
    """`[tau_1 ... tau_T] = U [C_1 ... C_T]` by SVD, `W = W_0 + scaling U C`, C the C_t merged by TIES (elect a sign, average those that agree).

    `combine`: before the election "ties" keeps the `density` share (0.2) of each task's largest coordinates, counted over the whole model as
    in the authors' code; "dare_ties" keeps a random `density` (0.9) of them by `seed`, divided by density. `scaling`: 0.6 for TIES in the
    paper's ViT-B/32, by validation. Tensors that are not linear modules are their own coordinates.
    """
    kept = _kept(site, _coordinates(site, state.bases), state.thresholds)
    sign = _sum(kept).sign()
    sign = torch.where(sign == 0, state.majority, sign)
    total, count = torch.zeros_like(kept[0]), torch.zeros_like(kept[0])
    for own in kept:
        agreeing = torch.where(own.sign() == sign, own, 0.0)
        total += agreeing
        count += agreeing != 0
    merged = total.div_(count.clamp_(min=1)).double()
    if site.linear:
        merged = state.bases.get(site.name, base.device).double() @ merged
    return (base.double() + scaling * merged).to(base.dtype)


def _shared_basis(site: Site) -> Tensor:
    """U (out, rank): left singular vectors of all task vectors side by side; of products from their factors."""
    products = [product for product in low_rank_of(site) if product is not None]
    if len(products) == len(site.experts) and sum(p.rank for p in products) < site.base.shape[0]:
        q = torch.linalg.qr(torch.cat([p.left.double() for p in products], 1)).Q
        small = torch.cat([(q.mT @ p.left.double()) @ p.right.double() for p in products], 1)
        u, s, _ = singular_triples(small)
        u = q @ u
    else:
        u, s, _ = singular_triples(torch.cat(task_vectors(site.base, site.experts), 1))
    return u[:, s > _SUPPORT]


def _coordinates(site: Site, bases: Spill) -> list[Tensor]:
    """C_t = U^T tau_t (rank, in), in the dtype of the weights; the basis is found where it is not known yet."""
    taus = task_vectors(site.base, site.experts)
    if site.linear:
        if site.name not in bases:
            bases.put(site.name, _shared_basis(site).to(site.base.dtype))
        u = bases.get(site.name, site.base.device).double()
        taus = [u.mT @ tau for tau in taus]
    return [tau.to(site.base.dtype) for tau in taus]


def _kept(site: Site, coordinates: Sequence[Tensor], thresholds: Sequence[float]) -> list[Tensor]:
    """What takes part in the election."""
    if site.parameters["combine"] == "ties":
        return [torch.where(c.abs().float() >= least, c, 0.0) for c, least in zip(coordinates, thresholds, strict=True)]
    density = site.parameters["density"]
    share = _DENSITY["dare_ties"] if density is None else density
    seeds = [site.seed(site.parameters["seed"], t) for t in range(len(coordinates))]
    return [
        blend(torch.zeros_like(c), [c], keep=[share], seeds=[seed], scales=[1 / share])
        for seed, c in zip(seeds, coordinates, strict=True)
    ]


def _balance(kept: Sequence[Tensor]) -> int:
    """Positive less negative entries of the sum."""
    return int(_sum(kept).sign().sum(dtype=torch.float64))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)

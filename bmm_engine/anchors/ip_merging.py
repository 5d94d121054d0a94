"""IP-Merging: give a host what donors know along directions that it has too (arXiv 2510.14387)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.domains import NonNegative
from bmm_engine.anchors.polar import task_triples
from bmm_engine.errors import ConfigError

logger = logging.getLogger(__name__)

Triples = tuple[Tensor, Tensor, Tensor]


@anchor(scope="module", symmetric=False, others="first", experts=(2, None), paper="Hu et al. 2025, arXiv 2510.14387")
def ip_merging(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    theta: NonNegative = 0.4,
    similarity: Literal["abs", "signed", "pair"] = "abs",
    pairing: Literal["rank", "best", "principal"] = "rank",
    weights: Literal["softmax", "unit"] = "softmax",
    basis: Literal["aligned", "span"] = "aligned",
    sharpness: NonNegative = 32.0,
    rank: Annotated[int, Field(ge=1)] = 1024,
) -> Tensor:
    """`W = W_1 + sum_t rho_t tau_t V diag(p_t^2) V^T`, the first expert the host, V its right singular vectors; a donor t that is not aligned adds 0.

    Of tau_1 and tau_t the `rank` largest triples; `rho_t` the ratio of their nuclear norms. Similarity `c_j = |<v_j of tau_t, v_j of tau_1>|`;
    a donor is aligned where one is at least `theta`. `weights`: "softmax" is `p = softmax(sharpness c)`, the authors', which picks about one
    direction; "unit" `p_j = 1` where `c_j >= theta`, else 0. `basis`: "span" projects on all of V instead. `similarity`: "signed" without the
    bars as in the authors' code, though an SVD's signs are arbitrary; "pair" times the sign of `<u_j, u_j>`. `pairing`: "best" compares each of
    the host's directions with the donor's nearest; "principal" takes the principal angles of both spans, and V turned to them. Unrelated
    directions reach about `sqrt(2 ln(2 rank) / in)`: below 64 inputs the default `theta` keeps nothing out. Everything else is the host's.
    Diagnostics: `similarity_2` ... of the donors, by their place among the experts (the host is 1), and `taken`, how many were aligned.
    Raises `ConfigError`.
    """
    if pairing == "principal" and similarity != "abs":
        raise ConfigError(
            f"anchor 'ip_merging': similarity {similarity!r} with pairing 'principal': principal angles have no sign; say similarity: abs."
        )
    host, *donors = task_triples(site, rank)
    added: Tensor | None = None
    site.diagnostics["taken"] = 0.0
    for t, donor in enumerate(donors, 2):
        if not (len(host[1]) and len(donor[1])):
            site.diagnostics[f"similarity_{t}"] = 0.0
            which = "donor" if len(host[1]) else "host"
            logger.info(
                "%s: expert %d adds nothing, since fine-tuning of the %s changed nothing here", site.name, t, which
            )
            continue
        cosines, directions = _similarities(host, donor, similarity, pairing)
        site.diagnostics[f"similarity_{t}"] = aligned = float(cosines.max())
        logger.info(
            "%s: expert %d, similarity %.3f%s", site.name, t, aligned, "" if aligned >= theta else ": adds nothing"
        )
        if aligned < theta:
            continue
        site.diagnostics["taken"] += 1
        if basis == "span":
            shares, directions = torch.ones_like(host[1]), host[2]
        elif weights == "unit":
            shares = (cosines >= theta).to(cosines.dtype)
        else:
            shares = torch.softmax(sharpness * cosines, 0).square()
        u, s, vh = donor
        part = (u * (s * (host[1].sum() / s.sum()))) @ ((vh @ directions.mT) * shares) @ directions
        added = part if added is None else added + part
    return experts[0].clone() if added is None else (experts[0].double() + added).to(base.dtype)


def _similarities(host: Triples, donor: Triples, similarity: str, pairing: str) -> tuple[Tensor, Tensor]:
    """c_j (k,), and the host's directions (k, in) that they belong to."""
    if pairing == "principal":
        _, cosines, turned = torch.linalg.svd(donor[2] @ host[2].mT, full_matrices=False)
        return cosines, turned @ host[2]
    if pairing == "rank":
        both = min(len(host[1]), len(donor[1]))
        signed = (donor[2][:both] * host[2][:both]).sum(1)
        left = (donor[0][:, :both] * host[0][:, :both]).sum(0)
    else:
        signed, left = donor[2] @ host[2].mT, donor[0].mT @ host[0]  # (donor's, host's)
    found = signed.abs() if similarity == "abs" else signed if similarity == "signed" else signed * left.sign()
    if pairing == "best":
        found = found.max(0).values
    # A direction of the host's that has no partner is like none.
    return torch.cat([found, found.new_zeros(len(host[1]) - len(found))]), host[2]

"""Core Space: merge adapters as small matrices in bases that they share, without loss, by any rule (arXiv 2509.17786)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor, get_anchor
from bmm_engine.anchors.polar import low_rank_of, singular_triples, task_vectors
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.errors import shown

_NONE: Mapping[str, Any] = {}


def _known(name: str) -> str:
    """The name of a rule that fits. Raises `ValueError`."""
    rule = get_anchor(name)
    unfit = (
        "may need what is measured on data, which is not of the cores"
        if rule.needs
        else "depends on the order of the experts, which the core does not keep"
        if not rule.symmetric
        else "works in bases of its own"
        if name == "core_space"
        else ""
    )
    if unfit:
        raise ValueError(f"that rule {unfit}; choose another, such as 'tsv_m' or 'ties'")
    return name


def _plain(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters with one value each. Raises `ValueError`."""
    for key, value in parameters.items():
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise ValueError(
                f"{key} must have one value, the same for all experts and layers, not {shown(value)}; what differs between experts is `weight`"
            )
    return parameters


@anchor(scope="module", others="scaled", paper="Panariello et al. 2025, arXiv 2509.17786")
def core_space(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    rule: Annotated[str, AfterValidator(_known)] = "tsv_m",
    rule_parameters: Annotated[Mapping[str, Any], AfterValidator(_plain)] = _NONE,
    scaling: float = 1.0,
    weight: PerExpert[float] = each(1.0),
) -> Tensor:
    """`W = W_0 + scaling U M V^T`: M the small cores `U^T tau_t V` merged by another `rule`, U and V the bases that all `tau_t = B_t A_t` share.

    U: the left singular vectors of `[B_1 ... B_T]`; V^T: the right ones of the A_t stacked. An adapter's tau_t keeps its own factors, as in the
    authors' code; any other is split by its SVD, `B = U_t S^1/2`, which loses nothing either, but is not small where its rank is not. `rule`: any
    by name that reads only weights and does not depend on the order of the experts; it gets each module's cores as experts of a base of zeros, and
    a whole-model rule sees one module at a time. `rule_parameters`: its parameters, one value each. `weight`: tau_t is multiplied by it first.
    A rule that does not depend on the basis (the average, `tsv_m` where no rank is cut off) gives what it gives outside.
    Raises `ConfigError`.
    """
    factors = _factors(site)
    if not any(b.shape[1] for b, _ in factors):
        return base.clone()
    # All directions, also those without a singular value: so the cores have the rank of all adapters together, as in the authors' code.
    left = torch.linalg.svd(torch.cat([b for b, _ in factors], 1), full_matrices=False)[0]  # (out, m)
    right = torch.linalg.svd(torch.cat([a for _, a in factors], 0), full_matrices=False)[2]  # (n, in)
    cores = [w * ((left.mT @ b) @ (a @ right.mT)) for (b, a), w in zip(factors, weight, strict=True)]
    merged = get_anchor(rule)(torch.zeros_like(cores[0]), cores, name=site.name, linear=True, **rule_parameters)
    return (base.double() + scaling * (left @ merged.double() @ right)).to(base.dtype)


def _factors(site: Site) -> list[tuple[Tensor, Tensor]]:
    """`(B_t, A_t)` of each expert, (out, r) and (r, in), in float64."""
    taus: list[Tensor] | None = None
    found = []
    for t, product in enumerate(low_rank_of(site)):
        if product is not None:
            found.append((product.left.double(), product.right.double()))
            continue
        taus = task_vectors(site.base, site.experts) if taus is None else taus
        u, s, vh = singular_triples(taus[t])
        root = s.sqrt()
        found.append((u * root, root[:, None] * vh))
    return found

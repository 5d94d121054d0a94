"""IP-Merging against a float64 oracle of plain SVDs, and its laws: what is not aligned leaves the host alone, bit for bit."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bmm_engine import merge
from bmm_engine.anchors import get_anchor
from bmm_engine.anchors.polar import singular_triples
from bmm_engine.errors import ConfigError
from tests.anchors.test_subspace import family, svd
from tests.numerics import relative_error

RULE = get_anchor("ip_merging")


def related(donors=2, out=12, width=20, share=0.7, dtype=torch.float64):
    """A base, a host, and donors that are partly the host's task vector."""
    base, (host, *others) = family(donors + 1, out, width, dtype=dtype)
    return base, [host, *(o + share * (host - base) for o in others)]


def oracle(
    base, experts, *, theta=0.4, similarity="abs", pairing="rank", weights="softmax", basis="aligned", rank=1024
):
    host, *donors = (e.double() - base.double() for e in experts)
    count = min(rank, *base.shape)
    # Signs of singular vectors mean nothing, so where they count they are those that the rule has.
    triples = svd if similarity == "abs" else singular_triples
    uh, sh, vh = triples(host)
    uh, sh, vh = uh[:, :count], sh[:count], vh[:count]
    merged = experts[0].double()
    for tau in donors:
        u, s, v = triples(tau)
        u, s, v = u[:, :count], s[:count], v[:count]
        directions = vh
        if pairing == "principal":
            _, c, turned = svd(v @ vh.T)
            directions = turned @ vh
        else:
            c = torch.empty(count, dtype=torch.float64)
            for j in range(count):
                pairs = []
                for k in [j] if pairing == "rank" else range(count):
                    one = float(v[k] @ vh[j])
                    sign = math.copysign(1.0, float(u[:, k] @ uh[:, j])) if similarity == "pair" else 1.0
                    pairs.append(abs(one) if similarity == "abs" else sign * one)
                c[j] = max(pairs)
        if float(c.max()) < theta:
            continue
        p = torch.exp(32 * c) / torch.exp(32 * c).sum() if weights == "softmax" else (c >= theta).double()
        if basis == "span":
            p, directions = torch.ones(count).double(), vh
        merged = merged + sh.sum() / s.sum() * (u @ torch.diag(s) @ v @ directions.T @ torch.diag(p**2) @ directions)
    return merged


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "unit", "theta": 0.3},
        {"pairing": "best", "weights": "unit", "theta": 0.5},
        {"pairing": "best", "similarity": "pair"},
        {"similarity": "pair", "weights": "unit"},
        {"similarity": "signed"},
        {"basis": "span", "rank": 5},
        {"pairing": "principal", "rank": 6, "weights": "unit", "theta": 0.6},
        {"pairing": "principal", "rank": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize(("donors", "out", "width"), [(2, 12, 20), (1, 20, 9), (3, 8, 8)])
def test_matches_its_formula(donors, out, width, options):
    base, experts = related(donors, out, width)
    truth = oracle(base, experts, **options)
    merged = RULE(base, experts, **options)
    assert relative_error(merged - experts[0], truth - experts[0]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_donor_that_is_not_aligned_leaves_the_host_bit_for_bit(dtype):
    base, experts = related(dtype=dtype)
    assert torch.equal(RULE(base, experts, theta=1.01), experts[0])
    assert not torch.equal(RULE(base, experts, theta=0.0), experts[0])
    # A host that is the base, a donor that is: neither has a direction
    assert torch.equal(RULE(base, [base, *experts[1:]], theta=0.0), base)
    assert torch.equal(RULE(base, [experts[0], base], theta=0.0), experts[0])


def test_unit_weights_bring_the_hosts_own_task_vector_over_whole():
    base, (host, _) = related(1)
    tau = host - base
    for pairing in ("rank", "best", "principal"):
        merged = RULE(base, [host, host], weights="unit", pairing=pairing)
        assert relative_error(merged - host, tau) < 1e-9
    # The authors' weights share 1 among all that agree
    merged = RULE(base, [host, host])
    assert relative_error(merged - host, tau / 12**2) < 1e-9


def test_a_donors_size_does_not_matter_its_number_does():
    base, (host, donor) = related(1)
    once = RULE(base, [host, donor], weights="unit") - host
    assert relative_error(RULE(base, [host, base + 7 * (donor - base)], weights="unit") - host, once) < 1e-9
    assert relative_error(RULE(base, [host, donor, donor], weights="unit") - host, 2 * once) < 1e-9
    assert relative_error(RULE(base, [donor, host], weights="unit") - donor, once) > 0.1


def test_what_is_added_lies_in_the_hosts_row_space():
    base, (host, donor) = related(1)
    low = base + torch.outer(torch.ones(12), (host - base)[0]) + torch.outer(torch.arange(12.0), (host - base)[1])
    added = RULE(base, [low, donor], theta=0.0, weights="unit") - low
    vh = svd(low - base)[2][:2]
    assert float(added.norm()) > 0
    assert float((added - added @ vh.T @ vh).norm()) < 1e-9 * float(added.norm())
    whole = RULE(base, [low, donor], theta=0.0, basis="span") - low
    ratio = svd(low - base)[1].sum() / svd(donor - base)[1].sum()
    assert relative_error(whole, ratio * (donor - base) @ vh.T @ vh) < 1e-9


def test_signs_of_principal_angles_are_refused():
    base, experts = related()
    with pytest.raises(ConfigError, match=r"'signed'.*similarity: abs"):
        RULE(base, experts, similarity="signed", pairing="principal")


def test_all_else_is_the_hosts():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (8, 6), "a.bias": (8,), "embed": (9, 4)}
    models = [{n: torch.randn(s, generator=generator).to(torch.bfloat16) for n, s in shapes.items()} for _ in range(3)]
    options = {"anchor": "ip_merging", "modules": ["a"], "alpha": math.inf}
    merged = merge(models[0], models[1:], anchor_parameters={"theta": 0.0}, **options).tensors
    assert [n for n in shapes if not torch.equal(merged[n], models[1][n])] == ["a.weight"]
    alone = merge(models[0], models[1:], anchor_parameters={"theta": 1.1}, **options).tensors
    assert all(torch.equal(alone[n], models[1][n]) for n in shapes)


def test_it_says_which_donors_a_module_took_and_how_near_each_was(tmp_path):
    base, (host, near) = related(1, share=2.0)
    far = family(3, 12, 20)[1][2]
    vh = [svd(w - base)[2] for w in (host, near, far)]
    near_c, far_c = (float((own * vh[0]).sum(1).abs().max()) for own in vh[1:])
    assert near_c > far_c
    models = [{"a.weight": w} for w in (base, host, near, far, base)]
    options = {"anchor": "ip_merging", "anchor_parameters": {"theta": (near_c + far_c) / 2}, "alpha": math.inf}
    merge(models[0], models[1:], modules=["a"], output=tmp_path / "out", **options)
    (found,) = json.loads((tmp_path / "out" / "bmm_merge.json").read_text())["modules"]["diagnostics"].values()
    assert found == pytest.approx({"taken": 1, "similarity_2": near_c, "similarity_3": far_c, "similarity_4": 0})

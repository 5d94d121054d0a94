"""ACE-Merging against a float64 oracle with a plain inverse, and what is left of it without its extras."""

from __future__ import annotations

import pytest
import torch

from bmm_engine.anchors import get_anchor
from tests.anchors.test_subspace import family, svd, taus
from tests.numerics import relative_error


def oracle(base, experts, *, ridge=0.01, center=True, collective=True, unevenness=0.3, fraction=0.3):
    parts = torch.stack(taus(base, experts))
    sizes = parts.square().sum((1, 2))
    logs = (sizes + 1e-12).log()
    gamma = float(logs.var() / (logs.mean() ** 2 + 1e-12)) if len(parts) > 1 else 0.0
    uneven = gamma > unevenness
    eye = torch.eye(base.shape[1], dtype=torch.float64)
    plain, top = 0.0 * eye, torch.zeros_like(parts[0])
    moments, a = [], 0.0 * eye
    for tau in parts:
        c = tau - tau.mean(0) if center else tau
        size = float(c.square().sum()) + 1e-12 if uneven else 1.0
        moments.append(c.T @ c / size)
        plain, a = plain + moments[-1], a + moments[-1] + ridge / size * eye
        top = top + c @ (moments[-1] + ridge / size * eye)
    row = plain.mean(0) / (sizes.mean() + 1e-12 if uneven else 1.0) * collective
    first = top @ torch.linalg.inv(a + row)  # the row joins every row
    if not uneven:
        return first
    residual = first + sum(tau @ (s - a / len(parts)) for tau, s in zip(parts, moments))
    u, s, vh = svd(residual)
    count = int(len(s) * fraction)
    return first + s[:count].mean() * (u[:, :count] @ vh[:count]) if count else first


@pytest.mark.parametrize(("tasks", "out", "width"), [(3, 12, 20), (4, 24, 12), (1, 6, 7), (2, 5, 5)])
@pytest.mark.parametrize(
    "options",
    [{}, {"center": False}, {"collective": False, "ridge": 0.5}, {"unevenness": 0.0, "fraction": 0.55}],
    ids=str,
)
def test_matches_its_formula(tasks, out, width, options):
    base, experts = family(tasks, out, width, size=0.3, dtype=torch.float64)
    experts = [base + (t + 1) * (e - base) for t, e in enumerate(experts)]
    truth = oracle(base, experts, **options)
    found = get_anchor("ace")(base, experts, scaling=-1.5, **options) - base
    assert relative_error(found, -1.5 * truth) < 1e-9


def test_uneven_sizes_bring_the_second_stage_by_themselves():
    """About 1 on one side and far above on the other: their logarithms differ by more than they are."""
    base, experts = family(3, 12, 20, size=1 / 240**0.5, dtype=torch.float64)
    experts[2] = base + 6 * (experts[2] - base)
    found = get_anchor("ace")(base, experts) - base
    assert relative_error(found, oracle(base, experts)) < 1e-9
    even = get_anchor("ace")(base, experts, unevenness=float("inf")) - base
    assert relative_error(even, oracle(base, experts, unevenness=float("inf"))) < 1e-9
    assert relative_error(found, even) > 0.1


def test_without_its_extras_it_is_regmean_on_the_task_vectors_own_grams():
    base, experts = family(3, 12, 20, dtype=torch.float64)
    grams = [tau.T @ tau + 0.01 * torch.eye(20).double() for tau in taus(base, experts)]
    truth = get_anchor("regmean")(base, experts, grams=grams, shrink=1.0)
    found = get_anchor("ace")(base, experts, center=False, collective=False)
    assert relative_error(found - base, truth - base) < 1e-9


@pytest.mark.parametrize("unevenness", [0.0, 0.3])
def test_a_task_vector_of_zeros_takes_no_part(unevenness):
    base, experts = family(2, 9, 7, dtype=torch.float64)
    rule = get_anchor("ace")
    merged = rule(base, experts, unevenness=unevenness)
    assert torch.equal(rule(base, [*experts, base.clone()], unevenness=unevenness), merged)
    assert torch.equal(rule(base, [base, base]), base)

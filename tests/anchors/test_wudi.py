"""WUDI: the closed form is the minimum that descent leads to, and the Adam form is the authors' iteration."""

from __future__ import annotations

import math

import pytest
import torch

from bmm_engine.anchors import get_anchor
from bmm_engine.anchors.adam import adam
from bmm_engine.ops.lowrank import LowRank

wudi = get_anchor("wudi")


def family(tasks=3, out=8, width=12, dtype=torch.float64, size=0.02):
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(out, width, generator=generator, dtype=dtype)
    return base, [base + size * torch.randn(out, width, generator=generator, dtype=dtype) for _ in range(tasks)]


def loss(merged, taus, power=2):
    return sum(((merged - tau) @ tau.T).square().sum() / tau.norm() ** power for tau in taus)


def stationary(taus, power):
    """The minimum nearest to `sum tau_t`, by least squares on the stacked equations `(M - tau_t) tau_t^T / ||tau_t||^(power/2) = 0`."""
    start = sum(taus)
    scaled = [tau / tau.norm() ** (power / 2) for tau in taus]
    unknown = torch.cat(scaled)  # (T out, in)
    wanted = torch.cat([s @ (tau - start).T for s, tau in zip(scaled, taus)])
    return start + torch.linalg.lstsq(unknown, wanted, driver="gelsd").solution.T


@pytest.mark.parametrize("norm", ["squared", "plain"])
@pytest.mark.parametrize(
    ("tasks", "out", "width"), [(3, 8, 12), (2, 3, 20), (4, 6, 6), (3, 30, 5), (1, 4, 9), (2, 1, 1), (5, 4, 30)]
)
def test_closed_form_is_the_minimum_nearest_to_the_sum(tasks, out, width, norm):
    base, experts = family(tasks, out, width)
    taus = [e - base for e in experts]
    power = 2 if norm == "squared" else 1
    merged = wudi(base, experts, norm=norm, solver="closed_form") - base
    torch.testing.assert_close(merged, stationary(taus, power), rtol=0, atol=1e-9)
    for direction in (torch.randn_like(base) * 1e-3 for _ in range(3)):
        assert loss(merged + direction, taus, power) > loss(merged, taus, power)


def test_null_space_keeps_what_the_sum_has_there():
    base, experts = family(2, 3, 20)
    rows = torch.cat([e - base for e in experts])
    null = torch.linalg.svd(rows)[2][len(rows) :]
    assert float(((wudi(base, experts, solver="closed_form") - base) @ null.T).abs().max()) < 1e-12


def test_equal_experts_and_a_zero_task_vector():
    base, (expert, *_) = family(1, 6, 9)
    # All equations are the expert's own.
    torch.testing.assert_close(wudi(base, [expert, expert, base], solver="closed_form"), expert, rtol=0, atol=1e-9)
    singular = base + 0.1 * torch.outer(torch.ones(6), torch.arange(9.0)).double()
    torch.testing.assert_close(wudi(base, [singular, singular], solver="closed_form"), singular, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["squared", "plain"])
@pytest.mark.parametrize(("tasks", "out", "width"), [(3, 8, 12), (2, 3, 20)])
def test_adam_is_the_authors_iteration(tasks, out, width, norm):
    base, experts = family(tasks, out, width)
    taus = [e - base for e in experts]
    power = 2 if norm == "squared" else 1
    merged = torch.nn.Parameter(sum(taus))
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(300):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(merged, taus, power).backward()
        optimizer.step()
    truth = merged.detach()
    moved = float((truth - sum(taus)).norm())
    got = wudi(base, experts, solver="adam", norm=norm) - base
    assert float((got - truth).norm()) < 1e-9 * moved
    narrow = wudi(base.float(), [e.float() for e in experts], solver="adam", norm=norm).double() - base.float().double()
    assert float((narrow - truth).norm()) < 1e-4 * float(truth.norm())
    assert loss(wudi(base, experts, norm=norm, solver="closed_form") - base, taus, power) < loss(got, taus, power)


def test_steps_and_learning_rate_are_used():
    base, experts = family()
    far = wudi(base, experts, solver="adam", steps=20, learning_rate=1e-3)
    near = wudi(base, experts, solver="adam", steps=1, learning_rate=1e-3)
    start = base + sum(e - base for e in experts)
    assert float((near - start).abs().max()) == pytest.approx(1e-3, rel=1e-3)
    assert float((far - start).norm()) > 5 * float((near - start).norm())


def test_adam_does_not_write_its_start_and_keeps_its_dtype():
    start = torch.ones(3)
    out = adam(start, lambda x: 2 * x, steps=5, learning_rate=0.1)
    assert torch.equal(start, torch.ones(3))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.full((3,), 0.5), rtol=0, atol=1e-2)


def spectral(taus, power, filter_of):
    """`M_0 + R Q diag(f(e) / e) Q^T`, direction by direction; `filter_of(e, rank)`, rank 0 the largest."""
    start = sum(taus)
    gram = sum(tau.T @ tau / tau.norm() ** power for tau in taus)
    residual = sum((tau - start) @ tau.T @ tau / tau.norm() ** power for tau in taus)
    values, vectors = torch.linalg.eigh(gram)
    for rank, (e, q) in enumerate(zip(values.flip(0).tolist(), vectors.T.flip(0))):
        if e > 1e-12:
            start = start + filter_of(e, rank) / e * torch.outer(residual @ q, q)
    return start


def singular_values(taus, power):
    values = torch.linalg.svdvals(torch.cat([tau / tau.norm() ** (power / 2) for tau in taus]))
    return values[values > 1e-6]


@pytest.mark.parametrize("norm", ["squared", "plain"])
@pytest.mark.parametrize(
    ("tasks", "out", "width"), [(3, 8, 12), (2, 3, 20), (4, 6, 6), (3, 30, 5), (1, 4, 9), (2, 1, 1), (5, 4, 30)]
)
def test_spectral_solver_is_its_filters(tasks, out, width, norm):
    base, experts = family(tasks, out, width)
    taus = [e - base for e in experts]
    power = 2 if norm == "squared" else 1
    s = singular_values(taus, power)
    ratio = max(1, round(float(s.sum() ** 2 / s.square().sum())))
    b = min(out, width) / max(out, width)
    omega = 2.858 if b == 1 else 0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43
    above = max(1, int((s > omega * s.quantile(0.5)).sum()))
    for options, filter_of in [
        ({}, lambda e, rank: (1 - math.exp(-300 * e)) * (rank < math.ceil(0.65 * width))),
        ({"time": 4.0, "share": 0.2}, lambda e, rank: (1 - math.exp(-4 * e)) * (rank < math.ceil(0.2 * width))),
        ({"filter": "participation"}, lambda e, rank: rank < ratio),
        ({"filter": "gavish_donoho"}, lambda e, rank: rank < above),
    ]:
        got = wudi(base, experts, norm=norm, solver="spectral", **options) - base
        truth = spectral(taus, power, filter_of)
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-11)


def test_a_share_is_of_all_directions_and_at_least_one():
    base, experts = family(3, 8, 10)
    taus = [e - base for e in experts]
    for share, kept in ((0.7, 7), (0.71, 8), (1e-12, 1), (1.0, 10)):
        got = wudi(base, experts, solver="spectral", share=share, time=1e9) - base
        torch.testing.assert_close(got, spectral(taus, 2, lambda e, rank, k=kept: rank < k), rtol=1e-9, atol=1e-11)


def test_spectral_solver_lies_between_the_sum_and_the_minimum():
    base, experts = family(3, 8, 12)
    start, least = base + sum(e - base for e in experts), wudi(base, experts, solver="closed_form")
    late = wudi(base, experts, solver="spectral", time=1e9, share=1.0)
    torch.testing.assert_close(late, least, rtol=0, atol=1e-10)
    early = wudi(base, experts, solver="spectral", time=1e-9, share=1.0)
    torch.testing.assert_close(early, start, rtol=0, atol=1e-9)
    taus = [e - base for e in experts]
    losses = [loss(wudi(base, experts, solver="spectral", time=t) - base, taus) for t in (0.1, 1.0, 10.0)]
    assert loss(start - base, taus) > losses[0] > losses[1] > losses[2] > loss(least - base, taus)


@pytest.mark.parametrize("filter", ["exponential", "participation", "gavish_donoho"])
def test_spectral_solver_of_products_of_one_expert_and_of_zeros(filter):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(9, 40, generator=generator, dtype=torch.float64)
    products = [
        LowRank(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, r), (r, 40))))
        for r in (2, 3)
    ]
    experts = [base + 0.1 * p.dense() for p in products]
    options = {"solver": "spectral", "filter": filter, "time": 20.0}
    dense = wudi(base, experts, **options)
    factored = wudi(base, experts, low_rank=[p.scale(0.1) for p in products], **options)
    torch.testing.assert_close(factored, dense, rtol=0, atol=1e-11)
    assert float((dense - base - sum(e - base for e in experts)).norm()) > 1e-2
    torch.testing.assert_close(wudi(base, [*experts, base], **options), dense, rtol=0, atol=1e-11)
    torch.testing.assert_close(wudi(base, experts[:1], **options), experts[0], rtol=0, atol=1e-11)
    assert torch.equal(wudi(base, [base, base], **options), base)

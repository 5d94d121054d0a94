"""WUDI: the closed form is the minimum that descent leads to, and the Adam form is the authors' iteration."""

from __future__ import annotations

import pytest
import torch

from bmm_engine.anchors import get_anchor
from bmm_engine.anchors.adam import adam

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

"""Solves with filters: each against a dense formula that decomposes nothing as the engine does, and their laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bmm_engine as bmm
from bmm_engine.errors import ConfigError
from bmm_engine.solving.filters import KINDS
from bmm_engine.solving.moments import DenseMoment, TaskVectorMoment, hybrid_moment
from tests.numerics import relative_error
from tests.solving.test_solve import make, oracle

FILTERS = [*KINDS, ("ridge", 3), ("exponential", 0.65), ("truncated", "participation"), ("truncated", 5)]
each_filter = pytest.mark.parametrize("chosen", FILTERS, ids=str)


def options_of(chosen):
    kind, directions = (chosen, None) if isinstance(chosen, str) else chosen
    return {"filter": kind, "directions": directions}


def wide(tasks=3, rank=None, out=7, width=12, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    anchor = normal(out, width)
    grams = [x.T @ x / len(x) for x in (normal(rank or 4 * width, width) for _ in range(tasks))]
    return anchor, [anchor + 0.1 * normal(out, width) for _ in range(tasks)], grams


def dense(anchor, experts, grams, alpha, filter="ridge", directions=None, betas=None):
    """`W_a + R h(A_0)`, h as a function of matrices: an inverse, an exponential, and projections by the singular vectors of A_0."""
    betas = betas or [1.0] * len(experts)
    a0 = sum(b * g for b, g in zip(betas, grams))
    r = sum(b * (e - anchor) @ g for b, e, g in zip(betas, experts, grams))
    width = len(a0)
    identity, lam = torch.eye(width, dtype=torch.float64), alpha * a0.trace() / width
    u, s, _ = torch.linalg.svd(a0)
    count = {None: width, "participation": round(float(s.sqrt().sum() ** 2 / s.sum()))}.get(directions, directions)
    count = round(count * width) if isinstance(count, float) else min(count, width)
    if filter == "truncated" and directions is None:
        count = int((s > lam).sum())
    within = u[:, :count] @ u[:, :count].T
    if filter == "ridge":
        h = torch.linalg.inv(a0 + lam * identity)
    elif filter == "exponential":
        # The series of (1 - exp(-x)) / x, halved until it converges: g(2x) = g(x) (1 + exp(-x)) / 2.
        halvings = max(0, math.ceil(math.log2(float(s[0] / lam)))) if s[0] > 0 else 0
        x = a0 / lam / 2**halvings
        h = sum(torch.linalg.matrix_power(-x, n) / float(math.factorial(n + 1)) for n in range(25))
        for n in range(halvings):
            h = h @ (identity + torch.matrix_exp(-x * 2**n)) / 2
        h = h / lam
    else:
        h = torch.linalg.pinv(within @ a0 @ within, rtol=1e-11, hermitian=True)
    return anchor + r @ within @ h @ within


@each_filter
@pytest.mark.parametrize("alpha", [1e-3, 0.3, 10.0])
@pytest.mark.parametrize("kind", ["full", "deficient", "wide", "hybrid", "weighted"])
def test_solves_and_paths_are_the_formula(chosen, alpha, kind):
    anchor, experts, grams = wide(rank=3 if kind == "deficient" else None, out=2 if kind == "wide" else 7)
    given, betas = list(grams), None
    if kind == "wide":  # task vectors of low rank: in > 3 out
        vectors = [e - 0.9 * anchor for e in experts]
        given = [TaskVectorMoment(u) for u in vectors]
        grams = [u.T @ u / u.square().sum() for u in vectors]
    elif kind == "hybrid":
        given = [hybrid_moment(DenseMoment(g), e, 0.25) for g, e in zip(grams, experts)]
        grams = [0.75 * g / g.trace() + 0.25 * e.T @ e / e.square().sum() for g, e in zip(grams, experts)]
    elif kind == "weighted":
        betas = [0.5, 0.0, 2.0]
    options = options_of(chosen)
    truth = dense(anchor, experts, grams, alpha, **options, betas=betas)
    solved = bmm.solve_map(anchor, experts, given, alpha=alpha, task_weights=betas, **options)
    assert relative_error(solved.weight, truth) < 1e-9
    a0 = sum(b * g for b, g in zip(betas or [1.0] * 3, grams))
    assert solved.ridge == pytest.approx([alpha * float(a0.trace()) / len(a0)])
    path = bmm.spectral_path(anchor, experts, given, betas, dtype=torch.float64)
    assert relative_error(path.solve(alpha=alpha, **options), truth) < 1e-9
    assert (
        relative_error(path.solve(alpha=alpha, scale=0.3, base=experts[0], **options), 0.7 * experts[0] + 0.3 * truth)
        < 1e-9
    )
    narrow = bmm.spectral_path(anchor.float(), [e.float() for e in experts], given, betas)
    assert relative_error(narrow.solve(alpha=alpha, **options), truth) < 1e-5


@pytest.mark.parametrize("alpha", [1e-2, 1.0])
def test_what_is_plain_is_solved_by_cholesky_to_the_bit(alpha):
    anchor, experts, grams = make()
    plain = bmm.solve_map(anchor, experts, grams, alpha=alpha).weight
    assert torch.equal(bmm.solve_map(anchor, experts, grams, alpha=alpha, filter="ridge").weight, plain)
    everything = bmm.solve_map(anchor.double(), experts, grams, alpha=alpha, directions=1.0).weight
    assert relative_error(everything, oracle(anchor, experts, grams, alpha)) < 1e-10


@each_filter
def test_limits(chosen):
    anchor, experts, grams = wide()
    options = options_of(chosen)
    assert torch.equal(bmm.solve_map(anchor, experts, grams, alpha=math.inf, **options).weight, anchor)
    path = bmm.spectral_path(anchor, experts, grams, dtype=torch.float64)
    assert torch.equal(path.solve(alpha=math.inf, **options), anchor)
    nothing = bmm.solve_map(anchor, experts, [0 * g for g in grams], alpha=0.1, **options).weight
    assert torch.equal(nothing, anchor)
    if options["directions"] is None:
        regmean = sum(e @ g for e, g in zip(experts, grams)) @ torch.linalg.inv(sum(grams))
        for alpha in (0.0, 1e-12):
            assert relative_error(bmm.solve_map(anchor, experts, grams, alpha=alpha, **options).weight, regmean) < 1e-9
        assert relative_error(bmm.solve_map(anchor, experts, grams, alpha=1e12, **options).weight, anchor) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_of_grams_without_full_rank_the_limit_is_the_solution_of_least_norm(kind):
    anchor, experts, grams = wide(rank=2)
    r, a0 = sum((e - anchor) @ g for e, g in zip(experts, grams)), sum(grams)
    truth = anchor + r @ torch.linalg.pinv(a0, rtol=1e-12, hermitian=True)
    for alpha in (0.0, 1e-14):
        if kind == "ridge" and alpha == 0.0:
            continue  # by Cholesky, which needs a jitter there
        solved = bmm.solve_map(anchor, experts, grams, alpha=alpha, filter=kind, directions=1.0).weight
        assert relative_error(solved, truth) < 1e-9


def test_all_directions_truncated_are_regmean_and_one_is_along_the_largest():
    anchor, experts, grams = wide()
    regmean = sum(e @ g for e, g in zip(experts, grams)) @ torch.linalg.inv(sum(grams))
    for directions in (12, 1000, 1.0):
        for alpha in (0.0, 1e6):  # which plays no part
            solved = bmm.solve_map(anchor, experts, grams, alpha=alpha, filter="truncated", directions=directions)
            assert relative_error(solved.weight, regmean) < 1e-9
    one = bmm.solve_map(anchor, experts, grams, alpha=1.0, filter="truncated", directions=1).weight
    _, _, q = torch.linalg.svd(sum(grams))
    assert relative_error(one - anchor, (regmean - anchor) @ torch.outer(q[0], q[0])) < 1e-9


@each_filter
def test_equal_experts_give_the_expert_where_there_is_mass(chosen):
    anchor, experts, grams = wide(rank=2)
    options = options_of(chosen)
    q = torch.linalg.svd(sum(grams))[0][:, :6]  # 3 Grams of rank 2
    alone = bmm.solve_map(anchor, [experts[0]], [sum(grams)], alpha=1e-6, **options).weight
    same = bmm.solve_map(anchor, [experts[0]] * 3, grams, alpha=1e-6, **options).weight
    assert relative_error(same, alone) < 1e-9
    if options["directions"] is None and chosen != "ridge":
        assert relative_error(same @ q, experts[0] @ q) < 1e-9
        assert relative_error(same - same @ q @ q.T, anchor - anchor @ q @ q.T) < 1e-9


@each_filter
def test_order_of_experts_and_batches(chosen):
    problems = [wide(seed=seed) for seed in (1, 2)]
    options = {"alpha": 0.1, **options_of(chosen)}
    alone = [bmm.solve_map(*problem, **options).weight for problem in problems]
    for (anchor, experts, grams), own in zip(problems, alone):
        for order in itertools.permutations(range(3)):
            again = bmm.solve_map(anchor, [experts[t] for t in order], [grams[t] for t in order], **options).weight
            assert relative_error(again, own) < 1e-12
    batch = bmm.solve_map(
        torch.stack([p[0] for p in problems]), *([torch.stack(x) for x in zip(*(p[n] for p in problems))] for n in (1, 2)),
        **options,
    ).weight  # fmt: skip
    assert torch.equal(batch, torch.stack(alone))


@given(st.sampled_from(KINDS), st.integers(0, 1000), st.floats(-4, 3), st.integers(1, 9), st.integers(1, 16))
def test_a_larger_ridge_and_fewer_directions_stay_nearer_to_the_anchor(kind, seed, log_alpha, out, width):
    anchor, experts, grams = wide(out=out, width=width, seed=seed)
    path = bmm.spectral_path(anchor, experts, grams, dtype=torch.float64)

    def moved(alpha, directions=None):
        return float((path.solve(alpha=alpha, filter=kind, directions=directions) - anchor).norm())

    alpha = 10**log_alpha
    assert moved(alpha * 3) <= moved(alpha) * (1 + 1e-9)
    by_count = [moved(alpha, k) for k in range(1, width + 1)]
    assert all(few <= more * (1 + 1e-9) for few, more in itertools.pairwise(by_count))
    if kind != "truncated":
        assert by_count[-1] == pytest.approx(moved(alpha), rel=1e-9)


def test_mistakes():
    anchor, experts, grams = wide()
    path = bmm.spectral_path(anchor, experts, grams)
    for solve in (path.solve, lambda **own: bmm.solve_map(anchor, experts, grams, **own)):
        with pytest.raises(ConfigError, match="filter must be 'ridge', 'exponential' or 'truncated', not 'tsvd'"):
            solve(alpha=0.1, filter="tsvd")
        with pytest.raises(ConfigError, match=r"directions must be a whole number >= 1.*not 0\.0"):
            solve(alpha=0.1, directions=0.0)
        with pytest.raises(ConfigError, match="alpha must be >= 0"):
            solve(alpha=-0.1, filter="exponential")
    with pytest.raises(ConfigError, match="not both"):
        bmm.solve_map(anchor, experts, grams, filter="exponential")
    with pytest.raises(ConfigError, match="finite and >= 0, not inf"):
        bmm.solve_map(anchor, experts, grams, ridge=math.inf, filter="truncated")

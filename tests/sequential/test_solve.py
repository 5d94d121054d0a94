"""One module's sequential solve on plain tensors, against rows themselves in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bmm_engine as bmm
from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.solving.moments import DenseMoment, hybrid_moment
from tests.numerics import relative_error


def rows(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def truth_of(anchor, experts, own, merged, streams, betas, alpha, drift, gamma, pseudo):
    """By the normal equations of all rows stacked; and each task's squared misfit over n for any weight. `pseudo[t]`: rows along the task vector,
    for which the expert's own weight is the aim."""
    aims = [(drift * x + (1 - drift) * y) @ w.T - drift * s for x, y, w, s in zip(own, merged, experts, streams)]
    weights = [torch.eye(len(y), dtype=y.dtype) + gamma / len(y) for y in merged]  # of pairs of rows
    a = sum(b * (y.T @ m @ y / len(y) + p.T @ p) for b, y, m, p in zip(betas, merged, weights, pseudo))
    lam = alpha * a.trace() / len(a)
    right = lam * anchor + sum(
        b * (z.T @ m @ y / len(y) + w @ p.T @ p)
        for b, z, y, m, w, p in zip(betas, aims, merged, weights, experts, pseudo)
    )
    solved = torch.linalg.solve(a + lam * torch.eye(len(a), dtype=a.dtype), right, left=False)
    return solved, lambda w: [float((y @ w.T - z).square().sum()) / len(y) for y, z in zip(merged, aims)]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 10.0]),
    st.sampled_from([0.0, 0.2, 0.9]),
)
def test_it_minimises_what_it_says(seed, tasks, width, outputs, with_bias, with_stream, drift, gamma, share):
    g = torch.Generator().manual_seed(seed)
    counts = [4 + 3 * t for t in range(tasks)]
    own = [rows(g, n, width) for n in counts]
    merged = [x + 0.3 * rows(g, *x.shape) for x in own]
    streams = [rows(g, n, outputs) * with_stream for n in counts]
    full = width + with_bias
    base, anchor, *experts = (rows(g, outputs, full) for _ in range(2 + tasks))
    projected = [bmm.ProjectedAccumulator(w, w - base, with_bias=with_bias, dtype=torch.float64) for w in experts]
    general = [bmm.DriftAccumulator(width, dtype=torch.float64) for _ in experts]
    for t in range(tasks):
        for part in (slice(0, 3), slice(3, None)):
            stream = [streams[t][part]] if with_stream else []
            projected[t].update(own[t][part], merged[t][part], *stream)
            general[t].update(own[t][part], merged[t][part])
    if with_bias:
        own, merged = ([torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) for x in xs] for xs in (own, merged))
    changes = [float((x @ (w - base).T).square().sum()) / len(x) for x, w in zip(own, experts)]
    betas = [tasks / c / sum(1 / k for k in changes) for c in changes]
    shares = [share / (1 + t) for t in range(tasks)]
    pseudo = [torch.cat([(w - base)[:, :width], torch.zeros(outputs, with_bias)], 1) for w in experts]
    pseudo = [
        math.sqrt(g / (1 - g) * float(y.square().sum()) / len(y)) * u / u.norm()
        for u, y, g in zip(pseudo, merged, shares)
    ]
    truth, misfit = truth_of(anchor, experts, own, merged, streams, betas, 0.1, drift, gamma, pseudo)
    for accumulators in (projected, general)[: 1 if with_stream else 2]:
        moments = [a.moments(with_bias=with_bias) for a in accumulators]
        options = {"drift": drift, "mean_weight": gamma, "hybrid": shares}
        found = bmm.solve_drift(anchor, experts, moments, alpha=0.1, task_weights="energy", base=base, **options)
        assert relative_error(found.weight, truth) < 1e-9
        assert found.change == pytest.approx(changes, rel=1e-9)
        assert found.task_weights == pytest.approx(betas, rel=1e-9)
        assert found.before == pytest.approx(misfit(anchor), rel=1e-6, abs=1e-9)
        assert found.after == pytest.approx(misfit(truth), rel=1e-6, abs=1e-9)


def test_without_drift_it_is_plain_bmm_and_at_an_infinite_ridge_the_anchor():
    g = torch.Generator().manual_seed(0)
    own = [rows(g, 40, 7, dtype=torch.float32) for _ in range(2)]
    anchor, *experts = (rows(g, 5, 7, dtype=torch.float32) for _ in range(3))
    measured = [bmm.DriftAccumulator(7) for _ in own]
    for accumulator, x in zip(measured, own):
        accumulator.update(x, x)
    moments = [a.moments() for a in measured]
    plain = bmm.solve_map(anchor, experts, [x.T @ x / len(x) for x in own], alpha=0.03).weight
    assert relative_error(bmm.solve_drift(anchor, experts, moments, alpha=0.03).weight, plain.double()) < 1e-5
    assert torch.equal(bmm.solve_drift(anchor, experts, moments, alpha=math.inf).weight, anchor)


@pytest.mark.parametrize(
    "options",
    [
        {"filter": "exponential"},
        {"filter": "truncated"},
        {"filter": "exponential", "directions": 0.65},
        {"directions": 2},
    ],
    ids=str,
)
def test_of_a_filter_it_is_what_gradient_descent_or_the_rows_projected_give(options):
    g = torch.Generator().manual_seed(3)
    own = [rows(g, 12, 6) for _ in range(2)]
    merged = [x + 0.3 * rows(g, 12, 6) for x in own]
    anchor, *experts = (rows(g, 4, 6) for _ in range(3))
    measured = [bmm.DriftAccumulator(6, dtype=torch.float64) for _ in own]
    for accumulator, x, y in zip(measured, own, merged):
        accumulator.update(x, y)
    found = bmm.solve_drift(anchor, experts, [a.moments() for a in measured], alpha=0.4, **options)
    a0 = sum(y.T @ y / len(y) for y in merged)
    r = sum((x @ w.T).T @ y / len(y) for x, y, w in zip(own, merged, experts)) - anchor @ a0
    lam, u = 0.4 * a0.trace() / 6, torch.linalg.svd(a0)[0]
    kept = {0.65: 4, 2: 2, None: 6}[options.get("directions")]
    if options.get("filter") == "truncated":
        kept = int((torch.linalg.svdvals(a0) > lam).sum())
        assert 0 < kept < 6
    q = u[:, :kept]
    if options.get("filter") == "exponential":
        h = torch.linalg.inv(a0) @ (torch.eye(6, dtype=torch.float64) - torch.matrix_exp(-a0 / lam)) @ q @ q.T
    else:
        ridge = 0.0 if "filter" in options else lam
        h = q @ torch.linalg.inv(q.T @ a0 @ q + ridge * torch.eye(kept, dtype=torch.float64)) @ q.T
    truth = anchor + r @ h
    assert relative_error(found.weight, truth) < 1e-9
    misfit = [float((y @ truth.T - x @ w.T).square().sum()) / len(y) for x, y, w in zip(own, merged, experts)]
    assert found.after == pytest.approx(misfit, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outputs", [4, 9])
def test_without_drift_a_share_is_that_of_the_hybrid_gram(dtype, outputs):
    g = torch.Generator().manual_seed(1)
    own = [rows(g, 5, 7, dtype=dtype) for _ in range(2)]
    base, anchor, *experts = (rows(g, outputs, 7, dtype=dtype) for _ in range(4))
    measured = [bmm.DriftAccumulator(7, dtype=dtype) for _ in own]
    for accumulator, x in zip(measured, own):
        accumulator.update(x, x)
    moments = [a.moments() for a in measured]
    grams = [x.T @ x / len(x) for x in own]
    # Scaled so that the data counts as without the task vector: that is what the task weights undo here.
    weights = [float(gram.trace()) for gram in grams]
    for share in (0.3, 0.95):
        hybrids = [hybrid_moment(DenseMoment(gram), w - base, share) for gram, w in zip(grams, experts, strict=True)]
        plain = bmm.solve_map(anchor, experts, hybrids, alpha=0.03, task_weights=weights).weight
        found = bmm.solve_drift(anchor, experts, moments, alpha=0.03, hybrid=share, base=base).weight
        assert relative_error(found, plain.double()) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_task_vectors_of_zero_and_shares_of_zero_add_nothing():
    g = torch.Generator().manual_seed(2)
    x, weight = rows(g, 6, 5), rows(g, 3, 5)
    accumulator = bmm.DriftAccumulator(5, dtype=torch.float64)
    accumulator.update(x, x + 1)
    moments = accumulator.moments()
    assert moments.with_task_vector(torch.zeros(3, 5), 0.5) is moments
    assert moments.with_task_vector(weight, 0.0) is moments


def test_bad_arguments_are_refused():
    moments = [bmm.DriftAccumulator(3)]
    moments[0].update(torch.ones(2, 3), torch.ones(2, 3))
    weight, own = torch.ones(2, 3), [moments[0].moments()]
    with pytest.raises(ConfigError, match="2 experts and 1 moments"):
        bmm.solve_drift(weight, [weight, weight], own, alpha=1.0)
    with pytest.raises(ShapeMismatchError, match="moments of width 3 for a module of width 4"):
        bmm.solve_drift(torch.ones(2, 4), [torch.ones(2, 4)], own, alpha=1.0)
    with pytest.raises(ConfigError, match="'energy' needs `base`"):
        bmm.solve_drift(weight, [weight], own, alpha=1.0, task_weights="energy")
    with pytest.raises(ConfigError, match=r"hybrid=0\.5 needs `base`"):
        bmm.solve_drift(weight, [weight], own, alpha=1.0, hybrid=0.5)
    with pytest.raises(ConfigError, match=r"a hybrid share must be in \[0, 1\), not 1.0"):
        bmm.solve_drift(weight, [weight], own, alpha=1.0, hybrid=1.0, base=weight)
    with pytest.raises(ConfigError, match=r"drift must be a number in \[0, 1\], .*not 1\.5"):
        bmm.solve_drift(weight, [weight], own, alpha=1.0, drift=1.5)
    with pytest.raises(ConfigError, match="2 hybrid shares for 1 experts"):
        bmm.solve_drift(weight, [weight], own, alpha=1.0, hybrid=[0.1, 0.2], base=weight)
    with pytest.raises(ConfigError, match="was measured without biases"):
        bmm.ProjectedAccumulator(weight, weight).moments(with_bias=True)

"""RegMean, RegMean++ and MaTS against float64 oracles written from their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from bmm_engine.anchors.mats import conjugate_gradients, mats
from bmm_engine.anchors.regmean import regmean
from bmm_engine.anchors.regmean_plusplus import regmean_plusplus
from bmm_engine.errors import (
    ConfigError,
    NonFiniteGramError,
    NotPositiveDefiniteError,
    NumericalWarning,
    ShapeMismatchError,
)
from bmm_engine.solving.moments import DenseMoment, TaskVectorMoment
from tests.numerics import relative_error


def problem(tasks=3, out=6, width=9, rows=40, seed=0, scale=1.0):
    """Base, experts (float32), and their Grams from `rows` random rows each (float64)."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(out, width, generator=generator)
    experts = [base + 0.1 * torch.randn(out, width, generator=generator) for _ in range(tasks)]
    mixing = torch.randn(tasks, width, width, generator=generator, dtype=torch.float64)
    inputs = [torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing[t] for t in range(tasks)]
    return base, experts, [scale * x.T @ x / rows for x in inputs]


def shrunk(gram, shrink):
    return shrink * gram + (1 - shrink) * torch.diag(gram.diagonal())


def regmean_oracle(experts, grams, shrink=1.0, weight=None, ridge=0.0):
    """arXiv 2212.09849, and the ridge as a pull to the weighted mean: the plain normal equations, by a general solve."""
    weight = weight or [1.0] * len(experts)
    grams = [c * shrunk(g, shrink) for c, g in zip(weight, grams)]
    total = sum(grams)
    lam = ridge * total.trace() / total.shape[0]
    mean = sum(c * e.double() for c, e in zip(weight, experts)) / sum(weight)
    right = sum(e.double() @ g for e, g in zip(experts, grams)) + lam * mean
    return torch.linalg.solve(total + lam * torch.eye(total.shape[0], dtype=torch.float64), right, left=False)


@pytest.mark.parametrize(
    ("rule", "default"), [(regmean, 0.9), (regmean_plusplus, 0.95)], ids=["regmean", "regmean_plusplus"]
)
@pytest.mark.parametrize(("out", "width", "tasks"), [(6, 9, 3), (9, 6, 2), (1, 7, 3), (5, 1, 2)])
def test_regmean_is_its_formula(rule, default, out, width, tasks):
    base, experts, grams = problem(tasks, out, width)
    for options in ({}, {"shrink": 1.0}, {"shrink": 0.0, "ridge": 0.3}, {"weight": [1.0, 0.0, 2.5][:tasks]}):
        truth = regmean_oracle(experts, grams, **{"shrink": default, **options})
        assert relative_error(rule(base, experts, grams=grams, **options), truth) < 1e-6, options


def test_grams_may_be_moments_or_matrices():
    base, experts, _ = problem(out=4, width=9)
    taus = [e - base for e in experts]
    factored = [TaskVectorMoment(tau) for tau in taus]  # rank 4 of 9: kept as a factor
    dense = [tau.double().T @ tau.double() / tau.double().square().sum() for tau in taus]
    kept = [DenseMoment((7 * gram).float(), rows=7) for gram in dense]
    truth = regmean_oracle(experts, dense, shrink=0.9)
    for grams in (dense, factored, kept, [factored[0], dense[1], kept[2]]):
        assert relative_error(regmean(base, experts, grams=grams), truth) < 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_grams_does_not_matter(scale):
    base, experts, grams = problem()
    truth = regmean_oracle(experts, grams, shrink=0.9, ridge=0.01)
    scaled = [scale * gram for gram in grams]
    assert relative_error(regmean(base, experts, grams=scaled, ridge=0.01), truth) < 1e-6


def test_rank_deficient_grams_leave_the_null_space_at_the_mean():
    base, experts, _ = problem()
    rows = torch.randn(2, 9, dtype=torch.float64)
    grams = [rows.T @ rows] * 3  # all tasks see the same two directions
    with pytest.warns(NumericalWarning, match="tensor: the sum of the Grams"):
        merged = regmean(base, experts, grams=grams, shrink=1.0)
    mean = sum(e.double() for e in experts) / 3
    assert relative_error(merged, mean) < 1e-6  # equal Grams: the mean where they see, and where they do not
    generator = torch.Generator().manual_seed(3)
    own = [torch.randn(2, 9, generator=generator, dtype=torch.float64) for _ in experts]
    with pytest.warns(NumericalWarning):
        merged = regmean(base, experts, grams=[r.T @ r for r in own], shrink=1.0).double()
    seen = torch.linalg.qr(torch.cat(own).T).Q  # six of nine directions
    unseen = torch.eye(9, dtype=torch.float64) - seen @ seen.T
    assert relative_error((merged - mean) @ unseen + 1, torch.ones(6, 9, dtype=torch.float64)) < 1e-5
    for expert, r in zip(experts, own):  # independent rows: every expert is met on its own inputs
        assert relative_error(merged @ r.T, expert.double() @ r.T) < 1e-5


def test_dead_features_and_zero_grams():
    base, experts, grams = problem()
    for gram in grams:
        gram[4] = gram[:, 4] = 0
    mean = sum(e.double() for e in experts) / 3
    with pytest.warns(NumericalWarning):
        merged = regmean(base, experts, grams=grams)
    assert relative_error(merged[:, 4:5], mean[:, 4:5]) < 1e-6
    zero = [torch.zeros(9, 9)] * 3
    assert relative_error(regmean(base, experts, grams=zero), mean) < 1e-6


@pytest.mark.parametrize("rule", [regmean, regmean_plusplus, mats])
def test_equal_experts_and_one_expert_are_kept_bit_for_bit(rule):
    base, experts, grams = problem()
    options = {"start": "average"} if rule is mats else {}
    for count in (1, 3):
        merged = rule(base, [experts[0]] * count, grams=grams[:count], **options)
        assert torch.equal(merged, experts[0])


def test_dtype_is_the_bases_and_inputs_are_not_written():
    base, experts, grams = problem()
    kept = [t.clone() for t in (base, *experts, *grams)]
    for rule in (regmean, mats):
        assert rule(base, experts, grams=grams).dtype == torch.float32
        assert rule(base.double(), [e.double() for e in experts], grams=grams).dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(kept, (base, *experts, *grams)))


def test_misuse():
    base, experts, grams = problem()
    with pytest.raises(ConfigError, match="2 Grams for 3 experts"):
        regmean(base, experts, grams=grams[:2])
    with pytest.raises(ShapeMismatchError, match=r"expert 1.*\(8, 8\).*\(9, 9\)"):
        regmean(base, experts, grams=[grams[0], grams[1][:8, :8], grams[2]])
    with pytest.raises(ShapeMismatchError, match=r"expert 0.*\(8, 8\)"):
        regmean(base, experts, grams=[DenseMoment(g[:8, :8]) for g in grams])
    broken = grams[2].clone()
    broken[1, 2] = math.nan
    with pytest.raises(NonFiniteGramError, match=r"expert 2.*1 entries") as caught:
        mats(base, experts, grams=[*grams[:2], broken])
    assert caught.value.count == 1
    with pytest.raises(ConfigError, match="all 0"):
        regmean(base, experts, grams=grams, weight=0.0)
    with pytest.raises(ConfigError, match="weight = -1"):
        regmean(base, experts, grams=grams, weight=-1)
    indefinite = grams[0] - 2 * torch.diag(grams[0].diagonal())
    indefinite[0, 0] = 10 * grams[0].trace()
    with pytest.raises(NotPositiveDefiniteError, match="leading minor 2") as failed:
        regmean(base, experts[:1], grams=[indefinite], name="layer.weight")
    assert failed.value.module == "layer.weight"


def start_of(start, base, experts, scaling=0.3):
    origin = base.double()
    return {
        "task_arithmetic": origin + scaling * sum(e.double() - origin for e in experts),
        "average": sum(e.double() for e in experts) / len(experts),
        "base": origin,
        "zero": torch.zeros_like(origin),
    }[start]


def krylov_optimum(a, b, start, steps):
    """What conjugate gradients reach, by their optimality: the least energy error over start + the Krylov space of the flat operator."""
    out = start.shape[0]
    flat = torch.kron(torch.eye(out, dtype=torch.float64), a)
    residual = (b - start @ a).reshape(-1)
    basis = [residual / residual.norm()]
    for _ in range(steps - 1):
        v = flat @ basis[-1]
        for _ in range(2):
            v = v - sum((v @ q) * q for q in basis)
        basis.append(v / v.norm())
    q = torch.stack(basis, 1)
    return start + (q @ torch.linalg.solve(q.T @ flat @ q, q.T @ residual)).reshape(start.shape)


@pytest.mark.parametrize("start", ["task_arithmetic", "average", "base", "zero"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_mats_is_conjugate_gradients_on_the_flat_weight(start, steps):
    base, experts, grams = problem()
    for shrink, weight in ((1.0, [1.0, 1.0, 1.0]), (0.7, [1.0, 2.0, 0.5])):
        own = [c * shrunk(g, shrink) for c, g in zip(weight, grams)]
        a, b = sum(own), sum(e.double() @ g for e, g in zip(experts, own))
        origin = start_of(start, base, experts)
        if start == "average":
            origin = sum(c * e.double() for c, e in zip(weight, experts)) / sum(weight)
        truth = krylov_optimum(a, b, origin, steps)
        options = {"steps": steps, "start": start, "shrink": shrink, "weight": weight, "tolerance": 0}
        assert relative_error(mats(base, experts, grams=grams, **options), truth) < 1e-6


def test_mats_ends_at_regmean_and_begins_at_its_start():
    base, experts, grams = problem(width=6)
    # 6 rows of 6 columns with one step length: the flat system has 6 different eigenvalues.
    done = mats(base, experts, grams=grams, steps=200, tolerance=1e-12)
    assert relative_error(done, regmean_oracle(experts, grams)) < 1e-5
    for start in ("task_arithmetic", "average", "base", "zero"):
        none = mats(base, experts, grams=grams, steps=0, start=start, scaling=0.4)
        assert relative_error(none, start_of(start, base, experts, 0.4)) < 1e-6
    loose = mats(base, experts, grams=grams, start="base", tolerance=1.0)
    assert torch.equal(loose, base)  # the base is nearer to the solution than 0 is


def test_mats_stops_where_no_curvature_is_left():
    base, experts, _ = problem()
    zero = [torch.zeros(9, 9)] * 3
    assert relative_error(mats(base, experts, grams=zero), start_of("task_arithmetic", base, experts)) < 1e-6
    rows = torch.randn(1, 9, dtype=torch.float64)
    merged = mats(base, experts, grams=[rows.T @ rows] * 3, start="average", tolerance=0)
    assert relative_error(merged, start_of("average", base, experts)) < 1e-5


def test_conjugate_gradients_are_scipys():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    base, experts, grams = problem(width=12, rows=13)
    a, b = sum(grams), sum(e.double() @ g for e, g in zip(experts, grams))
    operator = linalg.LinearOperator(
        (b.numel(),) * 2, matvec=lambda v: (torch.from_numpy(v).reshape(b.shape) @ a).reshape(-1).numpy(), dtype="f8"
    )
    start = base.double()
    for steps in (3, 10, 1000):
        expected, _ = linalg.cg(operator, b.reshape(-1).numpy(), x0=start.reshape(-1).numpy(), maxiter=steps)
        own = conjugate_gradients(a, b - start @ a, start, steps, 1e-5)
        assert relative_error(own, torch.from_numpy(expected).reshape(b.shape)) < 1e-9

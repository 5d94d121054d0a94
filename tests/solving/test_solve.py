"""The closed form: against a float64 oracle written from the formula, and its laws in the limits."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import (
    ConfigError,
    NonFiniteGramError,
    NonFiniteWeightError,
    NotPositiveDefiniteError,
    NumericalWarning,
    ShapeMismatchError,
)
from bmm_engine.solving.moments import DenseMoment
from bmm_engine.solving.solve import factorize, solve_map
from bmm_engine.solving.task_weights import energy_weights
from tests.numerics import assert_backward_stable, relative_error

OUT, IN = 7, 12


def oracle(anchor, experts, grams, alpha, betas=None):
    """arXiv 2605.12843 in its normal-equation form, float64, general inverse: written apart from the engine's residual form."""
    betas = betas or [1.0] * len(experts)
    a0 = sum(b * g.double() for b, g in zip(betas, grams))
    lam = alpha * a0.trace() / a0.shape[0]
    b = sum(b * e.double() @ g.double() for b, e, g in zip(betas, experts, grams)) + lam * anchor.double()
    return torch.linalg.solve(a0 + lam * torch.eye(a0.shape[0], dtype=torch.float64), b, left=False)


def make(tasks=3, rank=None, out=OUT, width=IN, dtype=torch.float32, seed=0, condition=1.0):
    generator = torch.Generator().manual_seed(seed)
    anchor = torch.randn(out, width, generator=generator)
    experts = [anchor + 0.1 * torch.randn(out, width, generator=generator) for _ in range(tasks)]
    grams = []
    for _ in range(tasks):
        x = torch.randn(rank or 4 * width, width, generator=generator) * torch.logspace(
            0, -math.log10(condition) / 2, width
        )
        grams.append(x.T @ x / x.shape[0])
    return anchor.to(dtype), [e.to(dtype) for e in experts], grams


def close(got, truth, tolerance=1e-6):
    assert torch.isfinite(got).all()
    error = float((got.double() - truth.double()).norm() / truth.double().norm())
    assert error < tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("alpha", [1e-4, 1e-2, 1.0, 1e4])
@pytest.mark.parametrize("rank", [None, 5, 1], ids=["full", "deficient", "rank1"])
def test_matches_the_normal_equations(alpha, rank):
    anchor, experts, grams = make(rank=rank)
    close(solve_map(anchor, experts, grams, alpha=alpha).weight, oracle(anchor, experts, grams, alpha))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounds_once_to_the_anchor_dtype(dtype):
    anchor, experts, grams = make(dtype=dtype)
    solved = solve_map(anchor, experts, grams, alpha=0.1).weight
    assert solved.dtype == dtype
    # Half an eps is the one rounding; the float64 oracle has roundings of its own.
    limit = 16 * torch.finfo(dtype).eps if dtype == torch.float64 else 0.51 * torch.finfo(dtype).eps
    assert relative_error(solved, oracle(anchor, experts, grams, 0.1)) <= limit


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
def test_backward_stable_on_ill_conditioned_grams(condition):
    anchor, experts, grams = make(dtype=torch.float64, condition=condition, width=40)
    grams = [g.double() for g in grams]
    alpha = 1e-8
    solved = solve_map(anchor, experts, grams, alpha=alpha).weight
    a0 = sum(grams)
    a = a0 + alpha * a0.trace() / 40 * torch.eye(40, dtype=torch.float64)
    r = sum((e - anchor) @ g for e, g in zip(experts, grams))
    assert_backward_stable(solved - anchor, a, r)


@pytest.mark.parametrize("rank", [None, 5])
def test_infinite_ridge_is_the_anchor(rank):
    anchor, experts, grams = make(rank=rank)
    assert torch.equal(solve_map(anchor, experts, grams, alpha=math.inf).weight, anchor)
    close(solve_map(anchor, experts, grams, alpha=1e9).weight, anchor)


def test_one_expert_at_zero_ridge_is_that_expert():
    anchor, experts, grams = make(tasks=1)
    close(solve_map(anchor, experts, grams, alpha=0.0).weight, experts[0])


def test_equal_experts_at_zero_ridge_are_that_expert():
    anchor, experts, grams = make()
    close(solve_map(anchor, [experts[0]] * 3, grams, alpha=0.0).weight, experts[0])


@pytest.mark.parametrize("rank", [None, 5])
def test_equal_experts_and_anchor_are_exact_at_any_ridge(rank):
    anchor, _, grams = make(rank=rank)
    assert torch.equal(solve_map(anchor, [anchor] * 3, grams, alpha=0.01).weight, anchor)


def test_zero_ridge_is_regmean():
    anchor, experts, grams = make()
    regmean = sum(e.double() @ g.double() for e, g in zip(experts, grams)) @ torch.linalg.inv(
        sum(g.double() for g in grams)
    )
    close(solve_map(anchor, experts, grams, alpha=0.0).weight, regmean)
    close(solve_map(anchor, experts, grams, alpha=1e-7).weight, regmean, 1e-5)


def test_isotropic_grams_mix_mean_and_anchor():
    anchor, experts, _ = make()
    grams = [2.0 * torch.eye(IN)] * 3
    mean = sum(experts) / 3
    close(solve_map(anchor, experts, grams, ridge=3.0).weight, (6 * mean + 3 * anchor) / 9)


def test_a_zero_gram_moves_nothing():
    anchor, experts, _ = make()
    for alpha in (0.0, 0.1):
        assert torch.equal(solve_map(anchor, experts, [torch.zeros(IN, IN)] * 3, alpha=alpha).weight, anchor)


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.float64, 1e-6), (torch.float32, 1e-1)])
def test_rank_deficient_leaves_the_null_space_at_the_anchor(dtype, alpha):
    # A float32 Gram is of full rank by its rounding (1e-8 of the diagonal), so its null space shows only over a larger ridge.
    anchor, experts, _ = make(tasks=1, dtype=torch.float64)
    x = torch.randn(5, IN, dtype=torch.float64)
    solved = solve_map(anchor, experts, [(x.T @ x).to(dtype)], alpha=alpha).weight
    null = torch.linalg.eigh(x.T @ x)[1][:, : IN - 5]
    assert float(((solved - anchor) @ null).norm()) < 1e-6 * float(anchor.norm())
    assert float((solved - anchor).norm()) > 1e-2 * float((experts[0] - anchor).norm())


def test_batch_equals_singles_and_stacked_members_equal_separate_ones():
    one, two = make(seed=1), make(seed=2)
    batch = solve_map(
        torch.stack([one[0], two[0]]),
        [torch.stack(pair) for pair in zip(one[1], two[1])],
        [torch.stack(pair) for pair in zip(one[2], two[2])],
        alpha=0.3,
    )
    for i, single in enumerate((one, two)):
        alone = solve_map(*single, alpha=0.3)
        close(batch.weight[i], alone.weight, 1e-7)
        assert batch.ridge[i] == pytest.approx(alone.ridge[0])
    stacked = solve_map(
        torch.cat([one[0], two[0]]), [torch.cat(pair) for pair in zip(one[1], two[1])], one[2], alpha=0.3
    ).weight
    close(stacked[:OUT], solve_map(*one, alpha=0.3).weight, 1e-7)
    close(stacked[OUT:], solve_map(two[0], two[1], one[2], alpha=0.3).weight, 1e-7)


def test_given_and_energy_task_weights():
    anchor, experts, grams = make()
    base = torch.zeros_like(anchor)
    given_weights = [0.5, 2.0, 1.0]
    close(
        solve_map(anchor, experts, grams, alpha=0.1, task_weights=given_weights).weight,
        oracle(anchor, experts, grams, 0.1, given_weights),
    )
    inverse = [1 / float((e.double() @ g.double() * e.double()).sum()) for e, g in zip(experts, grams)]
    expected = [w * 3 / sum(inverse) for w in inverse]
    solution = solve_map(anchor, experts, grams, alpha=0.1, task_weights="energy", base=base)
    assert solution.task_weights[0] == pytest.approx(expected)
    close(solution.weight, oracle(anchor, experts, grams, 0.1, expected))


def test_frobenius_task_weights_do_not_see_how_large_the_inputs_of_a_task_are():
    anchor, experts, grams = make(dtype=torch.float64)
    grams = [g.double() for g in grams]
    inverse = [1 / float(torch.linalg.matrix_norm(g)) for g in grams]
    solution = solve_map(anchor, experts, grams, alpha=0.1, task_weights="frobenius")
    assert solution.task_weights[0] == pytest.approx([w * 3 / sum(inverse) for w in inverse], rel=1e-12)
    truth = oracle(anchor, experts, grams, 0.1, inverse)
    assert relative_error(solution.weight, truth) < 1e-12
    grown = [1e3 * grams[0], *grams[1:]]
    assert relative_error(solve_map(anchor, experts, grown, alpha=0.1, task_weights="frobenius").weight, truth) < 1e-12
    assert relative_error(solve_map(anchor, experts, grown, alpha=0.1).weight, truth) > 1e-2


def test_energy_weights_of_a_zero_task_vector():
    assert energy_weights([0.0, 0.0]) == (1.0, 1.0)
    weights = energy_weights([4.0, 0.0, 1.0])
    assert weights[1] == max(weights)
    assert sum(weights) == pytest.approx(3)


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 100), alpha=st.floats(1e-3, 1e3))
def test_relative_ridge_does_not_see_the_scale_of_the_data(scale, seed, alpha):
    anchor, experts, grams = make(seed=seed)
    grams = [g.double() for g in grams]
    close(
        solve_map(anchor, experts, [g * scale for g in grams], alpha=alpha).weight,
        solve_map(anchor, experts, grams, alpha=alpha).weight,
    )


@given(seed=st.integers(0, 1000))
def test_experts_commute(seed):
    anchor, experts, grams = make(seed=seed)
    close(
        solve_map(anchor, experts[::-1], grams[::-1], alpha=0.1).weight,
        solve_map(anchor, experts, grams, alpha=0.1).weight,
    )


def test_jitter_touches_only_the_failing_member():
    good, bad = torch.eye(4, dtype=torch.float64), torch.diag(torch.tensor([1.0, 1.0, 1.0, -1e-9], dtype=torch.float64))
    with pytest.warns(NumericalWarning, match=r"bad.*jitter"):
        factors = factorize([[DenseMoment(good)], [DenseMoment(bad)]], [[1.0], [1.0]], ridge=0.0, names=["good", "bad"])
    assert factors[0].jitter == 0
    assert 1e-9 < factors[1].jitter < 1e-7
    assert torch.allclose(
        factors[1].lower @ factors[1].lower.T, bad + factors[1].jitter * torch.eye(4, dtype=torch.float64), atol=1e-15
    )


def test_indefinite_gram_is_a_typed_error():
    anchor, experts, grams = make(tasks=1)
    grams[0][3, 3] = -5.0
    with pytest.raises(NotPositiveDefiniteError, match=r"layer\.7") as caught:
        solve_map(anchor, experts, grams, ridge=0.0, name="layer.7")
    assert caught.value.module == "layer.7"
    assert caught.value.pivot == 4
    assert caught.value.ridge > 0


def test_float32_gram_without_full_rank_at_zero_ridge_warns_or_solves_but_stays_finite():
    anchor, experts, grams = make(tasks=1, rank=5, width=64)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        solution = solve_map(anchor, experts, grams, alpha=0.0)
    assert torch.isfinite(solution.weight).all()
    g = grams[0].double()
    difference = (solution.weight - experts[0]).double()
    assert float((difference @ g * difference).sum()) < 1e-6 * float(
        (experts[0].double() @ g * experts[0].double()).sum()
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"experts": lambda e: [e[0], e[1], e[2][:, :5]]}, ShapeMismatchError, r"expert 2.*\(7, 5\).*\(7, 12\)"),
        ({"grams": lambda g: [g[0], g[1], g[2][:5, :5]]}, ShapeMismatchError, r"\(5, 5\).*\(12, 12\)"),
        ({"grams": lambda g: g[:2]}, ConfigError, "3 experts and 2 Grams"),
        (
            {"experts": lambda e: [e[0], e[1].index_fill(0, torch.tensor([2]), math.nan), e[2]]},
            NonFiniteWeightError,
            "expert 1.*12 of 84",
        ),
        (
            {"grams": lambda g: [g[0], g[1].index_fill(0, torch.tensor([2]), math.inf), g[2]]},
            NonFiniteGramError,
            "12 entries",
        ),
    ],
)
def test_bad_tensors(change, error, words):
    anchor, experts, grams = make()
    arguments = {"experts": experts, "grams": grams}
    for key, edit in change.items():
        arguments[key] = edit(arguments[key])
    with pytest.raises(error, match=words):
        solve_map(anchor, **arguments, alpha=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": -1.0}, "alpha must be >= 0"),
        ({"alpha": math.nan}, "alpha must be >= 0"),
        ({}, "alpha .* or ridge"),
        ({"alpha": 1.0, "ridge": 1.0}, "not both"),
        ({"alpha": 1.0, "task_weights": [1.0]}, "1 task weights for 3 experts"),
        ({"alpha": 1.0, "task_weights": [0.0, 0.0, 0.0]}, "not all 0"),
        ({"alpha": 1.0, "task_weights": [1.0, -1.0, 1.0]}, ">= 0"),
        ({"alpha": 1.0, "task_weights": "energy"}, "needs `base`"),
        ({"alpha": 1.0, "task_weights": "enrgy"}, "'enrgy'"),
    ],
)
def test_bad_options(options, words):
    anchor, experts, grams = make()
    with pytest.raises(ConfigError, match=words):
        solve_map(anchor, experts, grams, **options)

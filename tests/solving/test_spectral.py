"""The spectral path against the factorisation, which has its own oracle, and in its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.solving.moments import DenseMoment, TaskVectorMoment
from bmm_engine.solving.solve import solve_map
from bmm_engine.solving.spectral import spectral_path
from tests.numerics import relative_error
from tests.solving.test_solve import make

ALPHAS = [1e-4, 1e-2, 1.0, 1e3]


def moments_of(grams):
    return [DenseMoment(gram) for gram in grams]


@pytest.mark.parametrize("rank", [None, 5, 1], ids=["full", "deficient", "rank1"])
def test_equals_the_factorisation_at_every_ridge(rank):
    anchor, experts, grams = make(rank=rank)
    path = spectral_path(anchor.double(), experts, moments_of(grams), dtype=torch.float64)
    # Zero eigenvalues of float32 Grams come out as small negative ones, which the path takes as 0.
    tolerance = 1e-12 if rank is None else 1e-6
    for alpha in ALPHAS:
        truth = solve_map(anchor.double(), experts, grams, alpha=alpha)
        assert relative_error(path.solve(alpha=alpha), truth.weight) < tolerance
        assert relative_error(path.solve(ridge=truth.ridge[0]), truth.weight) < tolerance


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1.0])
def test_float32_loses_nothing_to_the_condition(alpha):
    anchor, experts, grams = make(out=40, width=60, condition=1e8)
    truth = solve_map(anchor.double(), experts, grams, alpha=alpha).weight
    moved = (truth - anchor.double()).abs().max()
    path = spectral_path(anchor, experts, moments_of(grams))
    assert path.projected.dtype == torch.float32
    error = (path.solve(alpha=alpha).double() - truth).abs().max()
    assert error < 1e-5 * moved + 1e-6, "a float32 solve at this condition has no digits left"


def test_task_weights_scale_and_out():
    anchor, experts, grams = make()
    base, betas = torch.randn_like(anchor), [0.5, 0.0, 2.0]
    path = spectral_path(anchor, experts, moments_of(grams), betas)
    star = solve_map(anchor.double(), experts, grams, alpha=0.1, task_weights=betas).weight
    truth = base.double() + 0.3 * (star - base.double())
    weight = torch.empty(anchor.shape[1], anchor.shape[0], dtype=torch.bfloat16)
    assert path.solve(alpha=0.1, base=base, scale=0.3, out=weight.T).data_ptr() == weight.data_ptr()
    assert relative_error(weight.T, truth) < 4e-3
    assert relative_error(path.solve(alpha=0.1, base=base, scale=0.3), truth) < 1e-5


def test_task_vectors_as_moments():
    anchor, experts, _ = make()
    moments = [TaskVectorMoment(expert - anchor) for expert in experts]
    path = spectral_path(anchor.double(), experts, moments, dtype=torch.float64)
    truth = solve_map(anchor.double(), experts, moments, alpha=0.2).weight
    assert relative_error(path.solve(alpha=0.2), truth) < 1e-6


def test_limits():
    anchor, experts, grams = make()
    path = spectral_path(anchor, experts, moments_of(grams))
    assert torch.equal(path.solve(alpha=math.inf), anchor)
    assert relative_error(path.solve(alpha=1e9), anchor.double()) < 1e-6
    alone = spectral_path(anchor, experts[:1], moments_of(grams[:1]))
    assert relative_error(alone.solve(alpha=1e-9), experts[0].double()) < 1e-4


@given(st.integers(0, 1000), st.floats(-4, 4), st.integers(1, 9), st.integers(1, 20))
def test_between_ridges_the_distance_to_the_anchor_falls(seed, log_alpha, out, width):
    anchor, experts, grams = make(out=out, width=width, seed=seed)
    path = spectral_path(anchor.double(), experts, moments_of(grams), dtype=torch.float64)
    near, far = (path.solve(alpha=10**a) - anchor.double() for a in (log_alpha + 0.5, log_alpha))
    assert near.norm() <= far.norm() * (1 + 1e-9)


def test_errors():
    anchor, experts, grams = make()
    path = spectral_path(anchor, experts, moments_of(grams))
    with pytest.raises(ConfigError, match="not both"):
        path.solve()
    with pytest.raises(ConfigError, match="base"):
        path.solve(alpha=1.0, scale=0.5)
    with pytest.raises(ConfigError, match="2 task weights for 3"):
        spectral_path(anchor, experts, grams, [1.0, 1.0])
    with pytest.raises(ConfigError, match="3 experts and 2 Grams"):
        spectral_path(anchor, experts, grams[:2])
    with pytest.raises(ShapeMismatchError, match=r"\(5, 5\)"):
        spectral_path(anchor, experts, [torch.eye(5)] * 3)

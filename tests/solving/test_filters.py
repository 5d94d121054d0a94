"""The factors of a filter against their formulas in exact arithmetic, their laws, and the counts of directions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import ConfigError
from bmm_engine.solving.filters import KINDS, Filter, gavish_donoho, participation_ratio

E = torch.tensor([-1e-18, 0.0, 1e-15, 1e-9, 0.3, 0.3, 1.0, 4.0], dtype=torch.float64)
MASS = slice(3, None)  # 1e-15 is below eps * 8 * 4


def response(kind, e, ridge):
    """f(e) of one eigenvalue that has mass; 1 - exp(-x) of a small x by its series, which loses no digits."""
    if kind == "truncated":
        return float(e > ridge)
    x = Fraction(e) / Fraction(ridge)
    if kind == "ridge":
        return float(x / (x + 1))
    if x > Fraction(1, 10):
        return 1 - math.exp(-x)
    return float(sum(-((-x) ** n) / math.factorial(n) for n in range(1, 20)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [1e-6, 0.3, 50.0])
def test_factors_are_the_formula(kind, ridge):
    factors = Filter(kind).factors(E, ridge)
    assert factors.dtype == torch.float64
    assert not factors[:3].any(), "where there is no mass there is nothing to follow"
    for e, factor in zip(E[MASS].tolist(), factors[MASS].tolist(), strict=True):
        truth = response(kind, e, ridge) / e
        assert abs(factor - truth) <= 1e-15 * 8 * truth


@pytest.mark.parametrize("kind", KINDS)
def test_limits(kind):
    assert not Filter(kind).factors(E, math.inf).any()
    assert not Filter(kind, 3).factors(E, math.inf).any()
    everything = torch.where(torch.arange(8) < 3, 0.0, 1 / E)
    torch.testing.assert_close(Filter(kind).factors(E, 0.0), everything, rtol=1e-15, atol=0)
    assert not Filter(kind).factors(torch.zeros(4), 0.0).any()
    assert Filter(kind).factors(torch.zeros(0), 1.0).shape == (0,)
    tiny = torch.tensor([0.0, 5e-324, 1e-310], dtype=torch.float64)
    assert Filter(kind).factors(tiny, 0.0).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("directions", "count"),
    [(1, 1), (3, 3), (8, 8), (100, 8), (0.01, 1), (0.4, 3), (1.0, 8), ("participation", 4), ("gavish_donoho", 3)],
)
def test_directions_keep_the_largest(kind, directions, count):
    e = torch.tensor([1e-9, 1e-8, 1e-6, 1e-6, 1e-6, 0.3, 1.0, 4.0], dtype=torch.float64)
    ridge = 0.5
    if directions == "participation":
        s = e.sqrt()
        count = round(float(s.sum() ** 2 / (s**2).sum()))
        assert 1 < count < 8
    chosen = Filter(kind, directions)
    assert chosen.count(e) == count
    factors = chosen.factors(e, ridge)
    assert not factors[:-count].any()
    truth = 1 / e if kind == "truncated" else Filter(kind).factors(e, ridge)
    assert torch.equal(factors[-count:], truth[-count:])


def test_counts_of_known_spectra():
    # An equal spectrum is all there is; of a matrix with few rows, only those count.
    assert participation_ratio(torch.full((9,), 4.0)) == 9
    assert participation_ratio(torch.cat([torch.zeros(5), torch.full((4,), 1e-300, dtype=torch.float64)])) == 4
    assert participation_ratio(torch.tensor([1e-8, 1e-8, 1.0])) == 1
    assert participation_ratio(torch.zeros(3)) == gavish_donoho(torch.zeros(3)) == 0
    # One direction is left even where none stands out.
    assert gavish_donoho(torch.full((9,), 4.0)) == 1
    noise, signal = [1.0] * 5, [2.857**2, 2.859**2, 9.0]
    assert gavish_donoho(torch.tensor(noise + signal, dtype=torch.float64)) == 2
    # omega(0.5) of the paper's table of approximations: 0.07 - 0.2375 + 0.91 + 1.43 = 2.1725
    half = torch.tensor([0.0] * 7 + [1.0] * 5 + [2.172**2, 2.173**2], dtype=torch.float64)
    assert gavish_donoho(half) == gavish_donoho(half, aspect=0.5) == 1
    half[-2] = 2.1726**2
    assert gavish_donoho(half) == 2


@given(
    st.sampled_from(KINDS),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    st.floats(1e-9, 1e9),
    st.floats(1, 100),
    st.sampled_from([None, 1, 3, 0.5, 1.0, "participation", "gavish_donoho"]),
)
def test_between_anchor_and_regression_and_monotone(kind, values, ridge, more, directions):
    e = torch.tensor(sorted(values), dtype=torch.float64)
    chosen = Filter(kind, directions)
    f = chosen.factors(e, ridge) * e
    assert (f >= 0).all()
    assert (f <= 1 + 1e-15).all()
    assert (f.diff() >= -1e-15).all(), "a larger eigenvalue is followed no less"
    assert (chosen.factors(e, ridge * more) * e <= f + 1e-15).all(), "a larger ridge stays nearer to the anchor"
    assert int((f > 0).sum()) <= chosen.count(e) <= len(e)
    if e.max() > 0:
        assert chosen.count(e) >= 1


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.floats(1e-6, 1e6))
def test_counts_do_not_depend_on_the_scale(values, scale):
    e = torch.tensor(sorted(values), dtype=torch.float64)
    assert gavish_donoho(e * 2.0 ** round(math.log2(scale))) == gavish_donoho(e)
    assert participation_ratio(e * 2.0 ** round(math.log2(scale))) == participation_ratio(e)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tikhonov",), "'ridge', 'exponential' or 'truncated', not 'tikhonov'"),
        (("ridge", 0), "whole number >= 1.*not 0"),
        (("ridge", True), "not True"),
        (("ridge", 1.5), r"share \(0 < share <= 1.*not 1.5"),
        (("ridge", math.nan), "not nan"),
        (("truncated", "median"), "'participation' or 'gavish_donoho', not 'median'"),
    ],
)
def test_mistakes(arguments, words):
    with pytest.raises(ConfigError, match=words):
        Filter(*arguments)
    with pytest.raises(ConfigError, match="ridge must be >= 0"):
        Filter().factors(E, -1.0)
    with pytest.raises(ConfigError, match=r"aspect must be in \(0, 1\], not 2"):
        gavish_donoho(E, aspect=2)

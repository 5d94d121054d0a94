from __future__ import annotations

import math

import numpy as np
import pytest

from bmm_engine.errors import ConfigError, SearchExhaustedError
from bmm_engine.recipe.sections import SearchRecipe
from bmm_engine.searching.bayesian import maximize
from bmm_engine.searching.proposer import Proposer
from bmm_engine.searching.space import SearchGroup, Space

GROUPS = tuple(SearchGroup(name, (name,)) for name in ("a", "b", "c"))


def space(optimizer="BO", **options):
    names = [g.name for g in GROUPS]
    section = SearchRecipe(optimizer=optimizer, **options)
    return Space(GROUPS, ("average",), dict.fromkeys(names, 0.03), dict.fromkeys(names, 1.0), "none", section)


def value_of(candidate):
    """Best at alpha = 1, 0.1, 0.01."""
    exponents = [math.log10(min(candidate.alpha[g], 1e4)) for g in "abc"]
    return -sum((x + i) ** 2 for i, x in enumerate(exponents)) / 10 - (candidate.scale["a"] - 0.8) ** 2


def serial(proposer, count):
    found = []
    for number in range(count):
        _, candidate = proposer.ask(number)
        proposer.tell(number, value_of(candidate))
        found.append(candidate)
    return found


@pytest.mark.parametrize("optimizer", ["BO", "TwoPointsDE", "CMA", "OnePlusOne"])
def test_the_same_events_give_the_same_candidates(optimizer):
    first = serial(Proposer(space(optimizer), seed=3, budget=20, workers=1), 14)
    again = serial(Proposer(space(optimizer), seed=3, budget=20, workers=1), 14)
    assert first == again
    other = serial(Proposer(space(optimizer), seed=4, budget=20, workers=1), 14)
    assert first[:2] == other[:2]
    assert first != other


def test_bayesian_optimisation_finds_the_optimum_of_a_smooth_function():
    found = serial(Proposer(space(), seed=0, budget=40, workers=1), 40)
    start = value_of(found[1])
    assert max(map(value_of, found)) > 0.1 * start  # nine tenths of the way from the default to the optimum, 0


def test_trials_in_flight_are_not_proposed_again():
    proposer = Proposer(space(), seed=0, budget=40, workers=4)
    serial(proposer, 12)
    asked = [proposer.ask(number)[1] for number in range(12, 16)]
    points = [[math.log10(min(x.alpha[g], 1e4)) for g in "abc"] for x in asked]
    apart = [np.abs(np.subtract(x, y)).max() for i, x in enumerate(points) for y in points[:i]]
    assert min(apart) > 0.05
    for number, candidate in zip((14, 12, 15, 13), [asked[2], asked[0], asked[3], asked[1]]):
        proposer.tell(number, value_of(candidate))
    assert proposer.pending == 0


def test_a_space_without_more_candidates_is_exhausted():
    section = SearchRecipe(optimizer="OnePlusOne", scales="fixed", anchors=["a", "b"], alpha_range=(0.01, 0.0100001))
    own = Space((GROUPS[0],), ("x", "y"), {"a": 0.01}, {"a": 1.0}, "none", section)
    proposer = Proposer(own, seed=0, budget=20, workers=1)

    def all_trials():
        for number in range(20):
            proposer.ask(number)
            proposer.tell(number, 1.0)

    with pytest.raises(SearchExhaustedError, match="no more to offer"):
        all_trials()


def test_a_failed_trial_counts_as_the_worst_so_far():
    proposer = Proposer(space("TwoPointsDE"), seed=0, budget=20, workers=1)
    for number in range(3):
        _, candidate = proposer.ask(number)
        proposer.tell(number, None if number == 2 else value_of(candidate))
    assert serial_after(proposer, 3, 4)


def serial_after(proposer, first, count):
    return [proposer.tell(n, value_of(proposer.ask(n)[1])) for n in range(first, first + count)]


def test_unknown_optimizers_are_named():
    with pytest.raises(ConfigError, match="registers no 'TwoPointDE'; did you mean 'TwoPointsDE'"):
        Proposer(space("TwoPointDE"), seed=0, budget=3, workers=1)


def test_the_acquisition_is_maximised_within_its_bounds():
    bounds = np.array([[0.0, 1.0]] * 5)
    target = np.array([0.2, 0.9, 0.5, 1.3, -0.4])
    found = maximize(lambda x: -((x - target) ** 2).sum(1), bounds, np.random.RandomState(0))
    np.testing.assert_allclose(found, np.clip(target, 0, 1), atol=1e-4)

"""A faster proposal for Nevergrad's Bayesian optimisation: the same surrogate and the same criterion, maximised with fewer calls.

The package behind it asks its Gaussian process for one point at a time, several thousand times a proposal, and each call costs more in checks of
its argument than in arithmetic: 1 to 3 s a proposal at a dozen variables. Here a gradient's points are predicted together.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

RANDOM_POINTS = 4096
STARTS = 8
STEP = 1e-6
# Added to the diagonal of the surrogate's normalised covariance: a validation score is a step function of a ridge.
NOISE = 1e-3


def speed_up(bo: Any) -> None:
    """Replace how a `bayes_opt.BayesianOptimization` suggests its next point."""
    bo.set_gp_params(alpha=NOISE)
    bo.suggest = types.MethodType(_suggest, bo)


def _suggest(self: Any, utility: Any) -> Any:
    """The point of the unit cube that maximises the acquisition function, as the optimiser's dict."""
    if len(self._space) == 0:
        return self._space.array_to_params(self._space.random_sample())
    # One thread: matrices are tiny, and the bits of a proposal must not depend on how many cores are free.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the surrogate's own optimiser says when it ends at a bound
        self._gp.fit(self._space.params, self._space.target)
        best = maximize(
            lambda points: utility.utility(points, self._gp, self._space.target.max()),
            self._space.bounds,
            self._random_state,
        )
    return self._space.array_to_params(best)


def maximize(function: Callable[[np.ndarray], np.ndarray], bounds: np.ndarray, random_state: Any) -> np.ndarray:
    """Where `function` of points (n, d) -> (n,) is largest within `bounds` (d, 2): the best of random points, and of climbs from the best of them."""
    low, high = bounds[:, 0], bounds[:, 1]
    points = random_state.uniform(low, high, size=(RANDOM_POINTS, len(low)))
    values = function(points)
    order = np.argsort(-values, kind="stable")
    best, top = points[order[0]], values[order[0]]

    def descent(x: np.ndarray) -> tuple[float, np.ndarray]:
        """The negative value and its gradient, by one call for all coordinates."""
        step = np.where(x + STEP > high, -STEP, STEP)
        found = function(np.vstack([x, x + np.diag(step)]))
        return -found[0], -(found[1:] - found[0]) / step

    for start in points[order[:STARTS]]:
        found = minimize(descent, start, jac=True, bounds=bounds, method="L-BFGS-B")
        if -found.fun > top:
            best, top = found.x, -found.fun
    return np.clip(best, low, high)

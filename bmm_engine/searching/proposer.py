"""Asks Nevergrad for candidates and tells it their values, so that a study can be replayed event by event after a kill."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bmm_engine.errors import ConfigError, SearchExhaustedError, shown
from bmm_engine.searching.space import Candidate, Space

logger = logging.getLogger(__name__)

# So many repetitions of known candidates in a row mean that the space has no more to offer.
MOST_REPETITIONS = 50
# How many standard deviations above its mean a point may hope to be, in Bayesian optimisation's upper confidence bound.
KAPPA = 2.576


def check_optimizer(name: str) -> None:
    """Raise `ConfigError` unless Nevergrad is installed and registers `name`."""
    try:
        import nevergrad as ng
    except ImportError as error:
        raise ConfigError("a search needs Nevergrad: pip install 'bmm-engine[search]'") from error
    if name not in ng.optimizers.registry:
        close = difflib.get_close_matches(name, list(ng.optimizers.registry), 3, 0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "for example BO, NGOpt, TwoPointsDE, CMA."
        raise ConfigError(f"search.optimizer: Nevergrad registers no {shown(name)}; {hint}")


class Proposer:
    """The search's optimiser. The same sequence of asks and tells gives the same candidates.

    The space's first candidates come first; a candidate that is already known is told its value again and not proposed twice.
    """

    def __init__(self, space: Space, *, seed: int, budget: int | None, workers: int):
        import nevergrad as ng

        check_optimizer(space.options.optimizer)
        self.space = space
        self.first = space.first_candidates()
        parametrization = space.parametrization()
        parametrization.random_state.seed(seed)
        family = ng.optimizers.registry[space.options.optimizer]
        most = max(1, workers)
        with _quiet(ng):
            # Those that say they cannot work in parallel can be asked ahead all the same: see `_explore`.
            self._optimizer: Any = family(
                parametrization=parametrization,
                budget=budget or 100,
                num_workers=1 if family.no_parallelization else most,
            )
        if self._bayesian:
            from bmm_engine.searching.bayesian import speed_up

            speed_up(self._optimizer.bo)
        self._asked: dict[int, list[Any]] = {}  # trial -> Nevergrad's candidates of that point
        self._numbers: dict[str, int] = {}  # candidate's key -> trial
        self._values: dict[int, float] = {}
        self.pending = 0  # asked and not told

    def ask(self, number: int) -> tuple[str, Candidate]:
        """(kind, candidate) of trial `number`: a new one. Raises `SearchExhaustedError` where none is left."""
        import nevergrad as ng

        for repetition in range(MOST_REPETITIONS):
            if self.first:
                kind, candidate = self.first.pop(0)
                own = self._nearest(candidate)
            else:
                with _quiet(ng):
                    self._explore(repetition)
                    own = self._optimizer.ask()
                kind, candidate = "proposed", self.space.decode(own.value)
            known = self._numbers.get(candidate.key)
            if known is None:
                self._numbers[candidate.key] = number
                self._asked[number] = [own]
                self.pending += 1
                return kind, candidate
            if self._bayesian:
                continue  # its surrogate knows the point; what helps is to look further away
            if known in self._values:
                self._tell(own, self._values[known])
            else:
                self._asked[known].append(own)
        raise SearchExhaustedError(
            f"{MOST_REPETITIONS} proposals in a row were trials that are known already: the space has no more to offer this optimiser."
        )

    def tell(self, number: int, value: float | None) -> None:
        """The objective of a trial, higher is better; None for one that failed, which counts as the worst so far."""
        found = min(self._values.values(), default=0.0) if value is None else value
        self.pending -= 1
        self._values[number] = found
        for own in self._asked.pop(number):
            self._tell(own, found)

    def adopt(self, number: int, candidate: Candidate) -> None:
        """Take a candidate that was not asked for here: of a study whose first part another version of the optimiser made."""
        self._numbers[candidate.key] = number
        self._asked[number] = [self._nearest(candidate)]
        self.pending += 1

    def forget(self, number: int) -> None:
        """Take back the last ask, if it gave a candidate."""
        if self._asked.pop(number, None) is not None:
            self._numbers = {key: trial for key, trial in self._numbers.items() if trial != number}
            self.pending -= 1

    def _nearest(self, candidate: Candidate) -> Any:
        point: Mapping[str, Any] = self.space.encode(candidate)
        return self._optimizer.parametrization.spawn_child(new_value=dict(point))

    def _tell(self, own: Any, value: float) -> None:
        import nevergrad as ng

        try:
            with _quiet(ng):
                self._optimizer.tell(own, -value)
        except ng.errors.TellNotAskedNotSupportedError:
            logger.info("%s takes no values of points that it did not ask for", self.space.options.optimizer)

    @property
    def _bayesian(self) -> bool:
        return hasattr(self._optimizer, "bo")

    def _explore(self, repetition: int) -> None:
        """Bayesian optimisation that has not heard of the trials in flight would propose the same again: let each further one explore more."""
        if self._bayesian:
            self._optimizer.utility_kappa = KAPPA * 2.0 ** (self.pending + repetition)


@contextmanager
def _quiet(ng: Any) -> Iterator[None]:
    """Nevergrad warns of what it finds inefficient in a parametrization; that is our affair, not the user's."""
    with warnings.catch_warnings():
        for category in (ng.errors.NevergradWarning, FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield

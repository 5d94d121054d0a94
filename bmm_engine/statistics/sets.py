"""All that was measured for one merge, opened once and handed down."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bmm_engine.errors import ConfigError
from bmm_engine.statistics.fisher import FisherSet
from bmm_engine.statistics.grams import GramSet
from bmm_engine.statistics.sensitivity import SensitivitySet

Grams = Sequence[GramSet | str | os.PathLike[str]] | str | None
Fishers = Sequence[FisherSet | str | os.PathLike[str]]
Sensitivities = Sequence[SensitivitySet | str | os.PathLike[str]] | str


@dataclass(frozen=True)
class Statistics:
    """By expert, in the experts' order; what was not measured is empty. `sensitivities`: errors of outputs are weighed by them, and an anchor
    that needs some has them too; `anchor_sensitivities`: those that are the anchor's alone. `batches`: calibration data itself, for a walk.
    `task_vectors_weigh`: errors of outputs are weighed by the experts' task vectors."""

    grams: tuple[GramSet, ...] = ()
    fishers: tuple[FisherSet, ...] = ()
    sensitivities: tuple[SensitivitySet, ...] = ()
    batches: tuple[list[Any], ...] = ()
    anchor_sensitivities: tuple[SensitivitySet, ...] = ()
    task_vectors_weigh: bool = False

    @property
    def output_weights(self) -> str:
        """What errors of outputs are weighed by, as in a recipe."""
        return "task_vectors" if self.task_vectors_weigh else "sensitivity" if self.sensitivities else "none"

    def alike(self) -> Statistics:
        """These with all outputs alike."""
        return replace(self, sensitivities=(), task_vectors_weigh=False)

    @property
    def of_anchor(self) -> tuple[SensitivitySet, ...]:
        """The sensitivities that there are for the anchor's rule."""
        return self.anchor_sensitivities or self.sensitivities

    @classmethod
    def open(
        cls,
        grams: Grams = None,
        fishers: Fishers = (),
        sensitivities: Sensitivities = (),
        batches: Iterable[Iterable[Any]] = (),
        anchor_sensitivities: Sensitivities = (),
    ) -> Statistics:
        """From sets and paths of files. `grams`: "task_vectors" or None where they are not measured. `sensitivities`: or "task_vectors".

        Raises `ConfigError`, and what reading raises."""
        if isinstance(grams, str) and grams != "task_vectors":
            raise ConfigError(
                f"grams must be 'task_vectors' or a list with one GramSet or path per expert, not {grams!r}."
            )
        if isinstance(grams, (GramSet, os.PathLike, Mapping)):
            raise ConfigError("grams: give a list with one GramSet (or path) per expert, 'task_vectors' or None.")
        listed = () if grams is None or isinstance(grams, str) else grams
        return cls(
            tuple(g if isinstance(g, GramSet) else GramSet.load(g) for g in listed),
            tuple(f if isinstance(f, FisherSet) else FisherSet.load(f) for f in fishers),
            () if sensitivities == "task_vectors" else cls._sensitivities(sensitivities),
            tuple(list(own) for own in batches),
            cls._sensitivities(anchor_sensitivities),
            sensitivities == "task_vectors",
        )

    @staticmethod
    def _sensitivities(given: Sensitivities) -> tuple[SensitivitySet, ...]:
        if isinstance(given, (str, SensitivitySet, os.PathLike, Mapping)):
            said = repr(given) if isinstance(given, str) else f"a {type(given).__name__}"
            raise ConfigError(
                f"sensitivities must be 'task_vectors' or a list with one SensitivitySet or path per expert, not {said}."
            )
        return tuple(s if isinstance(s, SensitivitySet) else SensitivitySet.load(s) for s in given)

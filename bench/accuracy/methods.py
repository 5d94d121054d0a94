"""The rows of the table: every way to merge, by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import bmm_engine as bmm
from bench.accuracy.experiment import Experiment, load_tensors
from bench.report import note
from bmm_engine.evaluators.scores import Score
from bmm_engine.solving.agreement import SHRINKAGE

PRIORS = ("average", "task_arithmetic", "ties", "tsv_m", "iso_c", "iso_cts", "wudi")
"""The anchors on which every form of BMM is tried."""

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Of the anchor's difference from the base."""

HYBRID = 0.5

DATA_FREE: dict[str, Any] = {"sensitivities": "task_vectors", "shrinkage": SHRINKAGE}
"""What `bmm merge` does with nothing but checkpoints."""

SEARCH_SAMPLES = 32  # of each task, in the trials of a sequential search


@dataclass(frozen=True)
class Merge:
    """Tensors by the base's names, and what was chosen on validation data to make them, if anything was."""

    tensors: Mapping[str, Tensor]
    chosen: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Method:
    """A row: what is done, on which anchor; `needs`: names of statistics of the merger that it shares with other rows."""

    name: str
    anchor: str
    run: Callable[[], Merge]
    needs: str = ""


class Merger:
    """Merges the experts of one experiment; what several rows share is measured once."""

    def __init__(self, experiment: Experiment, *, trials: int):
        self.experiment, self.trials = experiment, trials
        self._last_anchor: tuple[str, Mapping[str, Tensor]] | None = None

    def methods(self) -> Iterator[Method]:
        """Cheap ones first."""
        rules = {name: rule for name, rule in bmm.registered_anchors().items() if self._takes_all(rule)}
        for name, rule in rules.items():
            needs = " ".join(sorted(rule.needs_of()))
            yield Method("anchor", name, lambda name=name: Merge(self.anchor(name)), needs)
            yield Method("anchor, scale searched", name, lambda name=name: self._scaled(name), needs)
        for name in PRIORS:
            yield Method("data-free, outputs alike", name, lambda name=name: self._merge(anchor=name))
            yield Method("data-free", name, lambda name=name: self._merge(anchor=name, **DATA_FREE))
            yield Method("data", name, lambda name=name: self._merge(anchor=name, grams=self.grams), "grams")
            yield Method(
                "hybrid",
                name,
                lambda name=name: self._merge(anchor=name, grams=self.grams, hybrid=HYBRID),
                "grams",
            )
            yield Method(
                "data, weighted outputs",
                name,
                lambda name=name: self._merge(anchor=name, grams=self.grams, sensitivities=self.sensitivities),
                "grams sensitivities",
            )
            yield Method(
                "hybrid, weighted outputs",
                name,
                lambda name=name: self._merge(
                    anchor=name, grams=self.grams, hybrid=HYBRID, sensitivities=self.sensitivities
                ),
                "grams sensitivities",
            )
            yield Method("sequential", name, lambda name=name: self._sequential(anchor=name))
            yield Method(
                "sequential, weighted outputs",
                name,
                lambda name=name: self._sequential(anchor=name, sensitivities=self.sensitivities),
                "sensitivities",
            )
        for name in PRIORS:
            yield Method("data-free, searched", name, lambda name=name: self._searched(anchor=name))
            yield Method(
                "data, searched", name, lambda name=name: self._searched(anchor=name, grams=self.grams), "grams"
            )
        for name in PRIORS:
            yield Method(
                "sequential, searched", name, lambda name=name: self._walks_searched(anchor=name), "sensitivities"
            )

    def measure(self, needs: str) -> None:
        """The statistics of these names, if they are not there yet."""
        for name in needs.split():
            started, known = time.perf_counter(), name in self.__dict__
            getattr(self, name)
            if not known:
                note(f"{name} of all experts measured in {time.perf_counter() - started:.0f} s")

    @cached_property
    def grams(self) -> list[Any]:
        return self.experiment.grams(self.experiment.samples)

    @cached_property
    def fishers(self) -> list[Any]:
        return [
            bmm.collect_fisher(self.experiment.classifier(task), own, labels="sampled", progress=False)
            for task, own in zip(self.experiment.tasks, self.experiment.batches, strict=True)
        ]

    @cached_property
    def sensitivities(self) -> list[Any]:
        return self.experiment.sensitivities(self.experiment.samples)

    @cached_property
    def sequential_grams(self) -> list[Any]:
        base, *experts = map(self.experiment.load, (self.experiment.base, *self.experiment.experts))
        return bmm.collect_sequential(base, experts, self.experiment.batches, progress=False)

    def anchor(self, rule: str) -> Mapping[str, Tensor]:
        """A rule's own merge at its defaults; the last one is kept."""
        if self._last_anchor is None or self._last_anchor[0] != rule:
            self._last_anchor = rule, self._anchor(rule)
        return self._last_anchor[1]

    def _anchor(self, rule: str) -> Mapping[str, Tensor]:
        needs = bmm.get_anchor(rule).needs_of()
        given = {"grams" if "grams" in need else need: getattr(self, need) for need in needs}
        return self._merge(anchor=rule, alpha=math.inf, **given).tensors

    def _takes_all(self, rule: Any) -> bool:
        least, most = rule.experts
        return least <= len(self.experiment.experts) and (most is None or len(self.experiment.experts) <= most)

    def _merge(self, **options: Any) -> Merge:
        merged = bmm.merge(self.experiment.base, self.experiment.experts, progress=False, **options)
        return Merge(merged.tensors or {})

    def _sequential(self, **options: Any) -> Merge:
        own = self.experiment
        merged = bmm.merge_sequential(own.base, own.experts, own.batches, progress=False, **options)
        return Merge(merged.tensors or {})

    def _scaled(self, rule: str) -> Merge:
        """The anchor, its difference from the base scaled as is best on validation data."""
        model = self.experiment.load(self.experiment.base)
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        load_tensors(model, self.anchor(rule))
        anchor = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def at(scale: float) -> dict[str, Tensor]:
            return {
                # At 1 the very same bits, so that the table need not score it again.
                name: torch.lerp(base[name], own, scale) if own.is_floating_point() else own
                for name, own in anchor.items()
            }

        def value(scale: float) -> float:
            model.load_state_dict(at(scale))
            return mean(self.experiment.search(model))

        best = max(SCALES, key=value)
        return Merge(at(best), {"scale": best})

    def _searched(self, **options: Any) -> Merge:
        found = self._found(**options)
        return Merge(found.tensors or {}, found.candidate.plain())

    def _walks_searched(self, anchor: str) -> Merge:
        """Outputs weighted, as `bmm merge` does; trials walk with few samples, the best one with all."""
        batches = self.experiment.calibration(min(SEARCH_SAMPLES, self.experiment.samples))
        found = self._found(anchor=anchor, batches=batches, sensitivities=self.sensitivities, task_weights="energy")
        merge = self._sequential(sensitivities=self.sensitivities, **found.arguments)
        return replace(merge, chosen=found.candidate.plain())

    def _found(self, **options: Any) -> bmm.SearchResult:
        own = self.experiment
        experts: Sequence[nn.Module] = [own.load(path) for path in own.experts]
        limits = {"trials": self.trials, "racing": True, "seed": own.seed}
        return bmm.search(own.load(own.base), experts, own.search.score, tasks=own.tasks, **limits, **options)


def mean(scores: Mapping[str, Score]) -> float:
    return sum(score.value for score in scores.values()) / len(scores)

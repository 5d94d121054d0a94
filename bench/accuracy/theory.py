"""`python -m bench.accuracy.theory`: what the theory claims, measured at one seed of a suite, on validation data.

How well data-free Grams are aligned with measured ones; what calibration data, the task vectors' share of a hybrid Gram, the ridge, and the number of
tasks do to a merge; and whether averaging over the posterior is better calibrated than the MAP.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bmm_engine as bmm
from bench.accuracy.command import SUITES
from bench.accuracy.experiment import Experiment, Scorer, load_tensors
from bench.accuracy.methods import DATA_FREE, HYBRID, PRIORS
from bench.report import commit, note
from bmm_engine.evaluators.scores import classification_score
from bmm_engine.models.architecture import linear_modules
from bmm_engine.models.roles import Layers, module_role
from bmm_engine.solving.moments import DenseMoment
from bmm_engine.solving.posterior import Posterior

SAMPLES = (1, 4, 16, 64, 256, 1024)
RIDGES = tuple(10.0**power for power in range(-5, 4))
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
DRAWS = 8

Row = dict[str, Any]


class Study:
    """One experiment, scored by `scorer` in the share of the experts' scores."""

    def __init__(self, experiment: Experiment, scorer: Scorer):
        self.experiment, self.scorer = experiment, scorer
        self.model = experiment.load(experiment.base)
        self.own = {
            task: scorer.score(experiment.load(path), task).value
            for task, path in zip(experiment.tasks, experiment.experts, strict=True)
        }
        self.grams = experiment.grams(experiment.samples)

    @cached_property
    def sensitivities(self) -> list[bmm.SensitivitySet]:
        return self.experiment.sensitivities(self.experiment.samples)

    def merged(self, **options: Any) -> float:
        """The mean over all tasks of score / expert's score, of a plain merge."""
        return self.value(bmm.merge(self.experiment.base, self.experiment.experts, progress=False, **options).tensors)

    def value(self, tensors: Any, tasks: Sequence[str] | None = None) -> float:
        load_tensors(self.model, tensors)
        tasks = self.experiment.tasks if tasks is None else tasks
        return statistics.mean(self.scorer.score(self.model, task).value / self.own[task] for task in tasks)

    def alignment(self) -> Iterator[Row]:
        """`cos_F(G_t, U_t^T U_t)` of every module and task."""
        own = self.experiment
        base = own.load(own.base)
        names = list(linear_modules(base))
        layers, before = Layers(names), base.state_dict()
        for t, path in enumerate(own.experts):
            after = own.load(path).state_dict()
            for name in names:
                weight = f"{name}.weight"
                moment = DenseMoment(self.grams[t].get(name).mean(), 1, module=name)
                cosine = bmm.alignment(moment, after[weight] - before[weight])
                yield {
                    "module": name,
                    "role": module_role(name),
                    "layer": layers(name),
                    "task": own.tasks[t],
                    "cosine": cosine,
                }

    def by_samples(self) -> Iterator[Row]:
        yield {"method": "data-free, outputs alike", "samples": 0, "value": self.merged()}
        yield {"method": "data-free", "samples": 0, "value": self.merged(**DATA_FREE)}
        for samples in SAMPLES:
            grams, weights = self.experiment.grams(samples), self.experiment.sensitivities(samples)
            batches = self.experiment.calibration(samples)
            for method, value in (
                ("data", self.merged(grams=grams)),
                ("hybrid", self.merged(grams=grams, hybrid=HYBRID)),
                ("data, weighted outputs", self.merged(grams=grams, sensitivities=weights)),
                ("hybrid, weighted outputs", self.merged(grams=grams, hybrid=HYBRID, sensitivities=weights)),
                ("sequential", self._walked(batches)),
                (
                    "sequential, weighted outputs, measured Grams alone",
                    self._walked(batches, sensitivities=weights, task_vector_samples=0),
                ),
                ("sequential, weighted outputs", self._walked(batches, sensitivities=weights)),
            ):
                yield {"method": method, "samples": samples, "value": value}

    def by_share(self) -> Iterator[Row]:
        """Of plain merges on the anchors that are the worst and the best by themselves."""
        for anchor in ("average", "tsv_m"):
            for method, weights in (("all outputs alike", []), ("weighted outputs", self.sensitivities)):
                for share in SHARES:
                    options: Row = {"anchor": anchor, "grams": self.grams, "hybrid": share, "sensitivities": weights}
                    yield {"anchor": anchor, "method": method, "share": share, "value": self.merged(**options)}

    def by_ridge(self) -> Iterator[Row]:
        """Of plain merges on each anchor; of `bmm merge` as it comes on the first."""
        ways: dict[str, Callable[..., float]] = {
            anchor: partial(self.merged, anchor=anchor, grams=self.grams) for anchor in PRIORS
        }
        ways[f"{PRIORS[0]}, sequential, weighted outputs"] = partial(
            self._walked, self.experiment.batches, sensitivities=self.sensitivities
        )
        for anchor, way in ways.items():
            for alpha in (*RIDGES, math.inf):
                yield {"anchor": anchor, "alpha": str(alpha), "value": way(alpha=alpha)}

    def by_tasks(self) -> Iterator[Row]:
        """The first two tasks, three, ... all."""
        for count in range(2, len(self.experiment.tasks) + 1):
            part = self.experiment.first(count)
            models: Row = {"base": part.base, "experts": part.experts, "progress": False}
            walk: Row = {**models, "batches": part.batches}
            grams, own = self.grams[:count], self.sensitivities[:count]
            for method, merge in (
                ("average", partial(bmm.merge, **models, alpha=math.inf)),
                ("data-free", partial(bmm.merge, **models, **DATA_FREE)),
                ("data", partial(bmm.merge, **models, grams=grams)),
                ("data, weighted outputs", partial(bmm.merge, **models, grams=grams, sensitivities=own)),
                (
                    "hybrid, weighted outputs",
                    partial(bmm.merge, **models, grams=grams, hybrid=HYBRID, sensitivities=own),
                ),
                ("sequential", partial(bmm.merge_sequential, **walk)),
                ("sequential, weighted outputs", partial(bmm.merge_sequential, **walk, sensitivities=own)),
            ):
                yield {"method": method, "tasks": count, "value": self.value(merge().tensors, part.tasks)}

    def calibration_error(self) -> Iterator[Row]:
        """Expected calibration error and log-likelihood of the MAP and of the mean of the probabilities of `DRAWS` draws."""
        own = self.experiment
        options: Row = {"grams": self.grams, "progress": False}
        map_probabilities = self._probabilities(bmm.merge(own.base, own.experts, **options).tensors)
        total: dict[str, Tensor] = {}
        for index in range(DRAWS):
            drawn = bmm.merge(own.base, own.experts, posterior=Posterior(seed=own.seed, index=index), **options).tensors
            for task, p in self._probabilities(drawn).items():
                total[task] = total.get(task, torch.zeros_like(p)) + p / DRAWS
        for method, found in (("MAP", map_probabilities), ("posterior average", total)):
            for task, p in found.items():
                score = classification_score(p, self.scorer.labels(task), self.scorer.tasks[task].metric, task)
                yield {"method": method, "task": task, "value": score.value, **score.details}

    def _walked(self, batches: Any, **options: Any) -> float:
        own = self.experiment
        return self.value(bmm.merge_sequential(own.base, own.experts, batches, progress=False, **options).tensors)

    def _probabilities(self, tensors: Any) -> dict[str, Tensor]:
        load_tensors(self.model, tensors)
        return {task: self.scorer.logits(self.model, task).softmax(1) for task in self.experiment.tasks}


PARTS: dict[str, Callable[[Study], Iterator[Row]]] = {
    "alignment": Study.alignment,
    "samples": Study.by_samples,
    "shares": Study.by_share,
    "ridge": Study.by_ridge,
    "tasks": Study.by_tasks,
    "calibration": Study.calibration_error,
}


def plot(report: dict[str, list[Row]], path: Path) -> None:
    """A panel for each part that was measured, but for the calibration error, which is a table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 2)

    def lines(axes: Any, rows: list[Row], key: str, x: str) -> None:
        for name in dict.fromkeys(row[key] for row in rows):
            own = [row for row in rows if row[key] == name and math.isfinite(float(row[x]))]
            axes.plot([float(row[x]) for row in own], [100 * row["value"] for row in own], ".-", label=name)
        axes.set_ylabel("mean of score / expert's score, %")
        if rows:
            axes.legend(fontsize=7)
        axes.grid(alpha=0.3)

    roles: dict[tuple[str, int], list[float]] = {}
    for row in report.get("alignment", []):
        if row["layer"] is not None:
            roles.setdefault((row["role"], row["layer"]), []).append(row["cosine"])
    for role in dict.fromkeys(role for role, _ in roles):
        points = sorted((layer, statistics.mean(own)) for (name, layer), own in roles.items() if name == role)
        panels[0, 0].plot(*zip(*points, strict=True), ".-", label=role)
    panels[0, 0].set(xlabel="layer", ylabel="cos(G, U^T U), mean over tasks")
    if roles:
        panels[0, 0].legend(fontsize=7)
    lines(panels[0, 1], report.get("samples", []), "method", "samples")
    panels[0, 1].set_xscale("symlog", linthresh=4)
    panels[0, 1].set_xlabel("calibration samples of each task")
    lines(panels[1, 0], report.get("ridge", []), "anchor", "alpha")
    panels[1, 0].set_xscale("log")
    panels[1, 0].set_xlabel("relative ridge")
    lines(panels[1, 1], report.get("tasks", []), "method", "tasks")
    panels[1, 1].set_xlabel("merged tasks")
    for axes in panels.flat:
        axes.set_visible(bool(axes.lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.theory", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    experiment = import_module(f"bench.accuracy.{options.suite}").prepare(options.data, options.cache, options.seed)
    study = Study(experiment, experiment.search)
    known = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    report: dict[str, Any] = {**known, "suite": options.suite, "seed": options.seed}
    for part in options.parts:
        report[part] = []
        report["commits"] = {**report.get("commits", {}), part: commit()}  # parts may be measured on different days
        for row in PARTS[part](study):
            report[part].append(row)
            if part != "alignment":
                note(f"{part}: {row}")
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()

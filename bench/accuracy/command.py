"""`python -m bench accuracy`: fine-tune (or find) the experts, merge them in every way, and score on test data."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import torch

from bench.accuracy import results
from bench.accuracy.experiment import Experiment, load_tensors
from bench.accuracy.methods import Merge, Merger, Method
from bench.accuracy.results import Result, normalised
from bench.harness import peak_mib_of
from bench.report import commit, hardware, note
from bmm_engine.checkpoint.identity import values_digest
from bmm_engine.errors import BmmError
from bmm_engine.evaluators.scores import Score

SUITES = ("text8", "vision4")


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    suite = import_module(f"bench.accuracy.{options.suite}")
    kept = [r for r in results.read(options.json) if _is_ours(r, options)] if options.json else []
    found: list[Result] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        experiment = suite.prepare(options.data, options.cache, seed, names=options.tasks, sizes=_sizes(suite, options))
        for result in _Table(experiment, options, [r for r in kept if r.seed == seed]).results():
            found.append(result)
            print(_line(result), flush=True)
            if options.json:  # after each row: an interrupted run keeps what it measured, and goes on from there
                rest = [r for r in kept if (r.seed, r.row) not in {(f.seed, f.row) for f in found}]
                results.write([*found, *rest], options.json)
    print(f"\n{results.table(found)}")
    if options.markdown:
        options.markdown.write_text(results.table(found), encoding="utf-8")
    if options.plot:
        results.plot(found, options.plot)
    return 0


class _Table:
    """The rows of one seed."""

    def __init__(self, experiment: Experiment, options: argparse.Namespace, kept: Sequence[Result]):
        self.experiment, self.options = experiment, options
        self.kept = {result.row: result for result in kept}
        self.model = experiment.load(experiment.base)
        self.merger = Merger(experiment, trials=options.trials)
        self.scored: dict[tuple[str, str], Mapping[str, Score]] = {}  # by split and the merge's digest

    def results(self) -> Iterator[Result]:
        experts = self._scores_of_experts()
        wanted = [m for m in self._methods() if self._is_wanted(m)]
        for method in wanted:
            if (known := self.kept.get((method.name, method.anchor))) is not None:
                yield known
                continue
            try:
                yield self._measure(method, experts)
            except BmmError as error:
                note(f"{method.name} {method.anchor}: left out: {error}")

    def _methods(self) -> Iterator[Method]:
        own = self.experiment
        yield Method("experts", "", lambda: Merge({}))
        yield Method("base", "", lambda: Merge(own.load(own.base).state_dict()))
        yield from self.merger.methods()

    def _is_wanted(self, method: Method) -> bool:
        label = f"{method.name} {method.anchor}".strip()
        return any(part in label for part in self.options.rows) and not any(
            part in label for part in self.options.without
        )

    def _scores_of_experts(self) -> dict[str, dict[str, Score]]:
        own, found = self.experiment, {}
        splits = {"test": own.test, **({"validation": own.validation} if self.options.validation else {})}
        for split, scorer in splits.items():
            found[split] = {
                task: scorer.score(own.load(path), task) for task, path in zip(own.tasks, own.experts, strict=True)
            }
        return found

    def _measure(self, method: Method, experts: Mapping[str, Mapping[str, Score]]) -> Result:
        own, merge = self.experiment, Merge({})
        self.merger.measure(method.needs)
        seconds = 0.0

        def work() -> None:
            nonlocal merge, seconds
            started = time.perf_counter()
            merge = method.run()
            seconds = time.perf_counter() - started

        peak = peak_mib_of(work, torch.device("cpu"))
        scores, validation = self._score(merge, experts, "test"), None
        shares = normalised(scores, experts["test"])
        if self.options.validation:
            parts = normalised(self._score(merge, experts, "validation"), experts["validation"])
            validation = statistics.mean(parts.values())
        worst = min(shares, key=shares.__getitem__)
        return Result(
            suite=own.suite,
            seed=own.seed,
            method=method.name,
            anchor=method.anchor,
            scores={task: score.value for task, score in scores.items()},
            mean=statistics.mean(score.value for score in scores.values()),
            normalised=statistics.mean(shares.values()),
            worst=shares[worst],
            worst_task=worst,
            calibration_error=statistics.mean(s.details["expected_calibration_error"] for s in scores.values()),
            validation=validation,
            seconds=seconds,
            peak_mib=peak,
            chosen=None if merge.chosen is None else dict(merge.chosen),
            hardware=hardware(torch.device("cpu")),
            commit=commit(),
        )

    def _score(self, merge: Merge, experts: Mapping[str, Mapping[str, Score]], split: str) -> Mapping[str, Score]:
        if not merge.tensors:
            return experts[split]
        load_tensors(self.model, merge.tensors)
        key = split, values_digest([self.model.state_dict()])
        if key not in self.scored:
            self.scored[key] = (self.experiment.test if split == "test" else self.experiment.validation)(self.model)
        return self.scored[key]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench accuracy", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="where each task's folder is")
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="where experts are kept")
    parser.add_argument("--seeds", type=int, default=3, help="how many, each with experts of its own")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows here, and take those of the same commit from it"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows here")
    parser.add_argument("--rows", nargs="+", default=[""], metavar="SUBSTRING", help="only rows that hold one of these")
    parser.add_argument("--without", nargs="+", default=[], metavar="SUBSTRING", help="no rows that hold one of these")
    parser.add_argument("--validation", action="store_true", help="score on validation data too, to choose defaults by")
    parser.add_argument("--trials", type=int, default=60, help="of a search")
    parser.add_argument("--tasks", nargs="+", default=(), help="only these tasks")
    parser.add_argument(
        "--size",
        nargs=4,
        type=int,
        metavar=("TRAIN", "CALIBRATION", "VALIDATION", "TEST"),
        help="rows of a task, at most",
    )
    return parser.parse_args(arguments)


def _sizes(suite: object, options: argparse.Namespace) -> object:
    sizes = suite.SIZES  # type: ignore[attr-defined]
    return type(sizes)(*options.size) if options.size else sizes


def _is_ours(result: Result, options: argparse.Namespace) -> bool:
    return result.suite == options.suite and result.commit == commit() and not result.commit.endswith("+")


def _line(result: Result) -> str:
    label = f"seed {result.seed} {result.method} {result.anchor}".strip()
    more = "" if result.validation is None else f", validation {100 * result.validation:.1f}"
    return (
        f"{label}: {100 * result.normalised:.1f} % of the experts, worst {100 * result.worst:.1f} ({result.worst_task}){more},"
        f" {result.seconds:.1f} s"
    )

"""Merging rules from end to end: `bmm merge` and mergekit's command line on the same checkpoints, from disk to disk, each a process of its own.

A sample is a whole process, imports and all, with the inputs in the page cache and nothing left for the disk to write. The two take turns. What the
first round wrote is checked before any other round runs: ours against the formula in float64, the rival's against the same formula, and the random
rules, for which there is none, against each other in their moments.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bench import formulas, processes, timing
from bench.anchor_models import Models, Shape
from bench.anchor_rules import RULES, Ours, Rule
from bench.report import Row, commit, hardware
from bmm_engine.checkpoint import Checkpoint

ROUNDS = 3
FOLDER = Path(tempfile.gettempdir()) / "bmm-bench-anchors"
# Ours is rounded once, so it may be as far from the formula as that rounded once, and little more; mergekit computes in bfloat16 and rounds often.
OURS_ROUNDINGS, RIVAL_ROUNDINGS = 1.05, 6.0
# Two draws of a random rule differ in their norms by this much and three standard deviations or so.
MOMENTS = 0.02
# No look-up on the hub is part of a merge of local files.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1"}

BMM = (sys.executable, "-c", "from bmm_engine.cli import main; main()")


@dataclass(frozen=True)
class Rival:
    """The Python that has mergekit, and how many rounds to run it in (None: all)."""

    python: str
    rounds: int | None = None

    def version(self) -> str:
        """Raises AssertionError when mergekit is not there."""
        ask = [self.python, "-c", "from importlib.metadata import version; print(version('mergekit'))"]
        told = subprocess.run(ask, capture_output=True, text=True)
        assert told.returncode == 0, f"{self.python} has no mergekit; name one that has by --rival-python"
        return told.stdout.strip()

    def command(self, config: Path, output: Path) -> list[str]:
        """As `mergekit-yaml CONFIG OUTPUT`; without a tokenizer, which the checkpoints lack."""
        return [self.python, "-m", "mergekit.scripts.run_yaml", str(config), str(output), "--no-copy-tokenizer"]


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of the bench `anchors`")
    group.add_argument("--rival", choices=["mergekit"], help="merge with this too, in turns (default: ours alone)")
    group.add_argument("--rival-python", metavar="PYTHON", help="the interpreter that has it (default: this one)")
    group.add_argument("--rival-rounds", type=int, metavar="N", help="run it in the first N rounds only")
    group.add_argument("--rules", type=_names, metavar="NAME,...", help=f"of {', '.join(RULES)} (default: all)")
    group.add_argument("--layers", type=int, metavar="N", help=f"of the checkpoints (default {Shape().layers})")
    group.add_argument("--dir", type=Path, help=f"where the checkpoints are made and kept (default {FOLDER})")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with a message where the options of this bench are given without it, or make no sense."""
    own = ("rival", "rival_python", "rival_rounds", "rules", "layers", "dir")
    given = [f"--{name.replace('_', '-')}" for name in own if getattr(options, name) is not None]
    if given and "anchors" not in options.names:
        parser.error(f"{given[0]} is for the bench `anchors`")
    if not options.rival and (options.rival_python or options.rival_rounds is not None):
        parser.error(f"{given[0]} needs --rival")
    for name in ("rival_rounds", "layers"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: at least 1")


def plans(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """The selected rules by name, each with its measurement."""
    rival = Rival(options.rival_python or sys.executable, options.rival_rounds) if options.rival else None
    shape = Shape() if options.layers is None else Shape(layers=options.layers)
    for name in options.rules or RULES:
        yield name, partial(_measure_in, options.dir or FOLDER, shape, name, options.rounds or ROUNDS, rival)


def _measure_in(folder: Path, shape: Shape, name: str, rounds: int, rival: Rival | None) -> list[Row]:
    return measure(name, Models(folder, shape), rounds, rival)


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in RULES:
            raise argparse.ArgumentTypeError(f"no rule {name!r}; there are {', '.join(RULES)}")
    return names


def measure(name: str, models: Models, rounds: int, rival: Rival | None) -> list[Row]:
    """One row for each way in which we have the rule. Raises AssertionError, before any further round, for a result that is wrong."""
    rule = RULES[name]
    version = rival.version() if rival else ""
    rival_rounds = min(rounds, rival.rounds or rounds) if rival else 0
    with tempfile.TemporaryDirectory(dir=models.folder) as scratch:
        bench = _Bench(rule, models, rival, Path(scratch))
        samples: dict[str, list[processes.Usage]] = {way: [] for way in (*rule.ours, *(["rival"] if rival else []))}
        ways = list(samples)
        for turn in range(rounds):
            models.read_all()
            for position in range(len(ways)):
                way = ways[(turn + position) % len(ways)]
                if way != "rival" or turn < rival_rounds:
                    samples[way].append(bench.run(way))
            if turn == 0:
                errors, rival_error = bench.check()
    theirs = samples.pop("rival", [])
    return [
        _row(label, rule, models, own, theirs, errors[label], rival_error, version) for label, own in samples.items()
    ]


class _Bench:
    """The files and processes of one rule's runs."""

    def __init__(self, rule: Rule, models: Models, rival: Rival | None, scratch: Path):
        self.rule, self.models, self.rival, self.scratch = rule, models, rival, scratch
        self.commands = {}
        for label, ours in rule.ours.items():
            recipe = self._write(f"{label}.yaml", self._recipe(ours))
            self.commands[label] = [*BMM, "merge", str(recipe), "-o", str(self._output(label)), "--offline"]
        if rival:
            self.commands["rival"] = rival.command(self._write("rival.yaml", self._config()), self._output("rival"))

    def run(self, way: str) -> processes.Usage:
        shutil.rmtree(self._output(way), ignore_errors=True)
        os.sync()
        return processes.run(self.commands[way], self.scratch / "log", ENVIRONMENT)

    def check(self) -> tuple[dict[str, float | None], float | None]:
        """The errors of ours and of the rival, the worst over some tensors: `||W - truth|| / ||truth - W_0||` where the truth is decided."""
        outputs = {way: Checkpoint.open(self._output(way)) for way in self.commands}
        errors: dict[str, float | None] = dict.fromkeys(self.commands)
        for name in self.models.checked:
            base, *experts = self.models.load(name)
            experts = experts[: len(self.rule.of_models)]
            first = next(iter(self.rule.ours))
            for way, output in outputs.items():
                merged = output.load(name).double()
                formula = self.rule.ours[first if way == "rival" else way].truth(self.models)
                if formula is not None:
                    limit = RIVAL_ROUNDINGS if way == "rival" else OURS_ROUNDINGS
                    error = _error(merged, formula(base, experts), base, limit, f"{way}, tensor {name!r}")
                    errors[way] = max(error, errors[way] or 0.0)
                elif way == "rival":
                    _assert_alike(outputs[first].load(name).double() - base, merged - base, name)
        return errors, errors.pop("rival", None)

    def _recipe(self, ours: Ours) -> dict[str, Any]:
        base, *experts = map(str, self.models.paths)
        return {
            "base": base,
            "experts": experts[: len(self.rule.of_models)],
            "anchor": dict(ours.anchor),
            "alpha": math.inf,
            "dtype": "bfloat16",
        }

    def _config(self) -> dict[str, Any]:
        base, *experts = map(str, self.models.paths)
        listed = [
            {"model": model, "parameters": dict(of_model)} if of_model else {"model": model}
            for model, of_model in zip(experts, self.rule.of_models, strict=False)
        ]
        config = {"merge_method": self.rule.method, "models": listed, "dtype": "bfloat16"}
        if self.rule.with_base:
            config["base_model"] = base
        return config | ({"parameters": dict(self.rule.parameters)} if self.rule.parameters else {})

    def _output(self, way: str) -> Path:
        return self.scratch / way.replace(" ", "-")

    def _write(self, name: str, content: Mapping[str, Any]) -> Path:
        path = self.scratch / name
        path.write_text(yaml.safe_dump(dict(content)))
        return path


def _error(merged: Tensor, truth: formulas.Truth, base: Tensor, limit: float, where: str) -> float:
    """Relative to the change of the weights. Raises AssertionError when it is above `limit` times that of the truth rounded to bfloat16."""

    def distance(a: Tensor, b: Tensor) -> float:
        return float(((a - b) * truth.decided).norm())

    rounding = distance(truth.merged.bfloat16().double(), truth.merged)
    found, moved = distance(merged, truth.merged), distance(truth.merged, base)
    assert found <= limit * rounding, (
        f"{where}: {found / moved:.3e} of the change away from the formula; rounding it to bfloat16 costs {rounding / moved:.3e}"
    )
    return found / moved


def _assert_alike(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Two draws of one random rule: as many entries moved, and as far."""
    allowed = MOMENTS + 3 / math.sqrt(ours.numel())
    for what, own, other in (
        ("norm of the change", float(ours.norm()), float(theirs.norm())),
        ("share of entries changed", float((ours != 0).double().mean()), float((theirs != 0).double().mean())),
    ):
        assert abs(own - other) <= allowed * other, f"tensor {name!r}: {what} is {own:.4g}, the rival's {other:.4g}"


def _row(
    label: str,
    rule: Rule,
    models: Models,
    own: Sequence[processes.Usage],
    theirs: Sequence[processes.Usage],
    error: float | None,
    rival_error: float | None,
    version: str,
) -> Row:
    ours_ms = [usage.seconds * 1e3 for usage in own]
    rival_ms = [usage.seconds * 1e3 for usage in theirs]
    middle = statistics.median(ours_ms)
    experts = len(rule.of_models)
    shape = f"{label}, {models.parameters / 1e6:.3g} M, {models.shape.layers} layers, base + {experts}"
    if theirs and len(theirs) < len(own):
        shape += f", rival run {len(theirs)} of {len(own)} times"
    return Row(
        op="anchors",
        backend="cpu",
        device="cpu",
        hardware=hardware(torch.device("cpu")),
        dtype="bfloat16",
        shape=shape,
        rival=f"mergekit {version} {rule.method}" if theirs else "-",
        ours_ms=middle,
        ours_spread=timing.spread(ours_ms) if len(ours_ms) > 1 else None,
        rival_ms=statistics.median(rival_ms) if theirs else None,
        rival_spread=timing.spread(rival_ms) if len(rival_ms) > 1 else None,
        ratio=statistics.median(rival_ms) / middle if theirs else None,
        tflops=None,
        peak_share=None,
        gbytes_per_s=2 * models.parameters * (experts + 2) / middle * 1e-6,
        peak_mib=max(usage.peak_mib for usage in own),
        error=error,
        rival_error=rival_error,
        commit=commit(),
        rival_mib=max((usage.peak_mib for usage in theirs), default=None),
        private_mib=max(usage.private_mib for usage in own),
        rival_private_mib=max((usage.private_mib for usage in theirs), default=None),
    )

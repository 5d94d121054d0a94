"""The command line of the benchmarks; `python -m bench --help`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from bench import anchors, peak, report, scaling
from bench.accuracy import command as accuracy
from bench.accuracy import picture
from bench.harness import Case, Plan, measure
from bench.report import Row, note

OPS = (
    "gram",
    "cross_gram",
    "assemble",
    "residual",
    "spectral",
    "select",
    "blend",
    "ranks",
    "cholesky",
    "regmean",
    "wudi",
)
NAMES = ("peak", *OPS, "scaling", "anchors")

ROUNDS = 9

_EPILOG = (
    "`python -m bench table FILE...` prints the rows of JSON files as one markdown table. `python -m bench accuracy`: quality;"
    " `python -m bench accuracy-picture --plot FILE.png` draws it by method. bench/README.md says what each measures."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 when an op's result was wrong; such a case is not timed, and the others are."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["table"]:
        return _table([Path(name) for name in arguments[1:]])
    if arguments[:1] == ["accuracy"]:
        return accuracy.main(arguments[1:])
    if arguments[:1] == ["accuracy-picture"]:
        return picture.main(arguments[1:])
    options = _parse(arguments)
    if options.plot:
        scaling.require_matplotlib()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    runs = _Runs(torch.device(options.device), options)
    rows: list[Row] = []
    with torch.no_grad():
        for name in options.names:
            for row in runs.rows(name):
                rows.append(row)
                print(_line(row), flush=True)
                if options.json:
                    report.write_json(rows, options.json)  # after each row: an interrupted run keeps what it measured
    if rows:
        print(f"\n{report.table(rows, markdown=options.markdown)}")
    else:
        note("nothing was measured" + (f": no shape holds {options.shapes!r}" if options.shapes else ""))
    if runs.wrong:
        note(f"wrong results: {'; '.join(runs.wrong)}")
    return 1 if runs.wrong or not rows else 0


class _Runs:
    """The rows of each bench by its name, and what was wrong."""

    def __init__(self, device: torch.device, options: argparse.Namespace):
        self.device, self.options = device, options
        self.wrong: list[str] = []

    def rows(self, name: str) -> Iterator[Row]:
        if name == "peak":
            yield from peak.rows(self.device)
        elif name == "scaling":
            yield from self._scaling()
        elif name == "anchors":
            for rule, measured in anchors.plans(self.options):
                if self.options.shapes in rule:
                    yield from self._unless_wrong(f"{name} {rule}", measured)
        else:
            plans: Iterator[Plan] = importlib.import_module(f"bench.{name}").cases(self.device)
            for shape, build in plans:
                if self.options.shapes in shape:
                    yield from self._unless_wrong(f"{name} {shape}", partial(self._measure, build))

    def _measure(self, build: Callable[[], Case]) -> list[Row]:
        return measure(build(), self.options.rounds or ROUNDS)

    def _scaling(self) -> Iterator[Row]:
        found: list[scaling.Curve] = []

        def measured(axis: scaling.Axis) -> list[Row]:
            found.append(scaling.measure_axis(axis, self.options.rounds or ROUNDS))
            print(found[-1].verdict(), flush=True)
            return found[-1].rows

        for axis in scaling.axes(self.device):
            if self.options.shapes in axis.name:
                yield from self._unless_wrong(f"scaling {axis.name}", partial(measured, axis))
        if self.options.plot and found:
            scaling.plot(found, self.options.plot)

    def _unless_wrong(self, name: str, rows: Callable[[], list[Row]]) -> list[Row]:
        try:
            return rows()
        except AssertionError as error:
            note(f"WRONG: {name}: {error}")
            self.wrong.append(name)
            return []


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benchmarks, each behind a correctness gate.", epilog=_EPILOG
    )
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    parser.add_argument("--shapes", default="", metavar="SUBSTRING", help="only shapes that hold this")
    parser.add_argument(
        "--rounds",
        type=_rounds,
        metavar="N",
        help=f"samples of each variant (default {ROUNDS}, fewer of slow ones; {anchors.ROUNDS} of `anchors`)",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table in markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="where `scaling` draws its curves")
    anchors.add_options(parser)
    options = parser.parse_args(arguments)
    anchors.check_options(parser, options)
    if options.plot and "scaling" not in options.names:
        parser.error("--plot is for the bench `scaling`")
    return options


def _rounds(text: str) -> int:
    rounds = int(text)
    if rounds < 2:
        raise argparse.ArgumentTypeError("at least 2, to have a spread")
    return rounds


def _line(row: Row) -> str:
    if row.ratio is None:
        speed = f"{row.gbytes_per_s:.1f} GB/s" if row.gbytes_per_s else f"{row.tflops:.3f} TFLOP/s"
        return f"{row.op} {row.shape}: {speed}"
    return f"{row.op} {row.backend} {row.dtype} {row.shape}: {row.ours_ms:.3f} ms, {row.ratio:.2f} x {row.rival}"


def _table(files: Sequence[Path]) -> int:
    rows: list[Row] = []
    for file in files:
        try:
            rows += report.read_json(file)
        except ValueError as error:
            note(f"left out: {error}")
    if not rows:
        note("usage: python -m bench table FILE...; no file held rows")
        return 1
    print(report.table(rows, markdown=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())

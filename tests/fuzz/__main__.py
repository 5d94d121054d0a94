"""`python -m tests.fuzz --cases 1000 --seed N`: mutated inputs of every kind through `bmm`, judged by exact oracles; exit code 1 for any fault."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# Said before torch and transformers are imported: a child must find no thread of its parent's to wait for, and nothing asks the hub.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from tests.fuzz.campaign import run_cases, table
from tests.fuzz.case import FAULTS, Outcome
from tests.fuzz.kinds import KINDS
from tests.fuzz.material import make_material


def main() -> int:
    options = _options()
    sys.stdout.reconfigure(errors="backslashreplace")  # what was mutated may be no text
    kinds = options.kind or list(KINDS)
    numbers = [options.case] if options.case is not None else range(options.first, options.first + options.cases)
    verbose = options.case is not None
    with tempfile.TemporaryDirectory(prefix="bmm-fuzz-", dir=options.scratch) as name:
        scratch = Path(name)
        began = time.monotonic()
        material = make_material(scratch / "material")
        print(f"material made in {time.monotonic() - began:.1f} s", file=sys.stderr)

        def told(outcome: Outcome) -> None:
            if verbose or outcome.what in FAULTS:
                _show(outcome, verbose)

        outcomes = run_cases(
            options.seed, numbers, material, scratch, kinds=kinds, jobs=options.jobs, keep=verbose, told=told
        )
        if verbose and sys.stdin.isatty():
            input(f"{outcomes[0].folder} is removed on Enter ")
    print(table(outcomes))
    slowest = max(outcomes, key=lambda o: o.ended.seconds)
    print(
        f"{time.monotonic() - began:.0f} s; slowest case {slowest.number} {slowest.ended.seconds:.1f} s; "
        f"most memory {max(o.ended.peak_bytes for o in outcomes) / 2**20:.0f} MiB"
    )
    failed = [o for o in outcomes if o.what in FAULTS]
    if failed:
        chosen = "".join(f" --kind {kind}" for kind in options.kind or ())
        print(f"{len(failed)} failed; replay one with: python -m tests.fuzz --seed {options.seed}{chosen} --case N")
        for what in dict.fromkeys(o.what for o in failed):
            print(f"  {what}: {' '.join(str(o.number) for o in failed if o.what == what)}")
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="replay one case and print all of it")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only these kinds (repeatable)")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--scratch", help="where files are made (default: the system's temporary folder)")
    return parser.parse_args()


def _show(outcome: Outcome, verbose: bool) -> None:
    case = outcome.case
    print(
        f"case {outcome.number} [{outcome.kind}] {outcome.what.upper()}: {case.did}\n    {outcome.detail[:600]}",
        flush=True,
    )
    if verbose:
        print(f"    bmm {' '.join(case.argv)}\n    in {outcome.folder}, exit {outcome.ended.code}")
        print(f"--- stdout\n{outcome.ended.out}\n--- stderr\n{outcome.ended.err}")


if __name__ == "__main__":
    sys.exit(main())

"""Cases by the hundred: made from a seed, run, judged and counted."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.fuzz import child
from tests.fuzz.case import (
    FAULTS,
    GOOD,
    HANG,
    LONG,
    MEMORY,
    OK,
    ORACLE,
    RAW,
    REFUSED,
    SILENT,
    TYPED,
    UNJUDGED,
    UNNAMED,
    Case,
    Ended,
    Outcome,
    Unjudged,
)
from tests.fuzz.kinds import KINDS
from tests.fuzz.material import Material

LONGEST_MESSAGE = 1500
ALARM_S = 20.0
_ALLOCATION = re.compile(r"MemoryError|can't allocate memory|bad_alloc|Cannot allocate memory", re.IGNORECASE)


def make_case(seed: int, number: int, material: Material, folder: Path, kinds: Iterable[str]) -> tuple[str, Case]:
    """Case `number` of a campaign, its files in `folder`; the same for the same arguments."""
    kinds = list(kinds)
    kind = kinds[number % len(kinds)]
    rng = random.Random(f"{seed}/{number}/{kind}")
    folder.mkdir(parents=True)
    return kind, KINDS[kind](rng, material, folder)


def run_cases(
    seed: int,
    numbers: Iterable[int],
    material: Material,
    scratch: Path,
    *,
    kinds: Iterable[str] = tuple(KINDS),
    jobs: int = 1,
    keep: bool = False,
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the cases, `jobs` at a time; `told` hears of each as it ends. Folders of cases that went well are removed unless `keep`."""
    outcomes: list[Outcome] = []
    running: dict[int, tuple[str, int, Case, Path, float]] = {}

    def finish() -> None:
        pid, status, peak = child.wait()
        kind, number, case, folder, began = running.pop(pid)
        ended = child.ended(folder, status, peak, time.monotonic() - began)
        what, detail = judge(case, ended)
        outcomes.append(Outcome(kind, number, what, case, ended, detail, folder))
        told(outcomes[-1])
        if what in GOOD and not keep:
            shutil.rmtree(folder, ignore_errors=True)

    for number in numbers:
        folder = scratch / f"case-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        kind, case = make_case(seed, number, material, folder, kinds)
        pid, began = child.start(case.argv, folder, ALARM_S)
        running[pid] = (kind, number, case, folder, began)
        if len(running) >= jobs:
            finish()
    while running:
        finish()
    return sorted(outcomes, key=lambda outcome: outcome.number)


def judge(case: Case, ended: Ended) -> tuple[str, str]:
    """What a case came to, and why."""
    if ended.signal == signal.SIGALRM:
        return HANG, f"no end after {ALARM_S:.0f} s"
    if ended.peak_bytes > child.MEMORY_LIMIT:
        return MEMORY, f"{ended.peak_bytes / 2**30:.1f} GiB resident"
    if ended.signal is not None:
        return RAW, f"ended by {signal.Signals(ended.signal).name}"
    if ended.code == 0:
        return _judge_result(case, ended)
    if "Traceback (most recent call last)" in ended.err or ended.code != 2:
        last = ended.err.strip().splitlines()[-1:] or [f"exit code {ended.code}"]
        return (MEMORY if _ALLOCATION.search(last[0]) else RAW), last[0]
    found = re.search(r"^error: .*", ended.err, re.MULTILINE | re.DOTALL)
    if found is None:
        return RAW, f"no error was named: {ended.err.strip()[:200]!r}"
    message = found[0].strip()
    if case.harmless:
        return REFUSED, message
    if len(message) > LONGEST_MESSAGE:
        return LONG, f"{len(message)} characters: {message[:200]} ..."
    if not any(name in message for name in case.names):
        return UNNAMED, message
    return TYPED, message


def _judge_result(case: Case, ended: Ended) -> tuple[str, str]:
    try:
        wrong = case.judge(ended)
    except Unjudged as error:
        return UNJUDGED, str(error)
    except Exception as error:  # an oracle that fails is a fault of this harness, and is shown as one
        return ORACLE, f"{type(error).__name__}: {error}"
    return (OK, "") if wrong is None else (SILENT, wrong)


def table(outcomes: list[Outcome]) -> str:
    """Rows: kinds; columns: what the cases came to."""
    columns = [what for what in (*GOOD, *FAULTS) if what in GOOD or any(o.what == what for o in outcomes)]
    lines = ["".join([f"{'kind':<13}", f"{'cases':>7}", *(f"{what:>13}" for what in columns)])]
    kinds = list(dict.fromkeys(o.kind for o in outcomes))
    for kind in [*kinds, "all"]:
        own = Counter(o.what for o in outcomes if kind in (o.kind, "all"))
        lines.append("".join([f"{kind:<13}", f"{own.total():>7}", *(f"{own[what]:>13}" for what in columns)]))
    return "\n".join(lines)

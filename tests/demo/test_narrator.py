from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from bmm_engine.demo.narrator import Narrator
from bmm_engine.progress import track

# A worker starts as a new process: for seconds nothing else is said than that it does. Its second job fails.
RUN = """
import json, sys
from pathlib import Path
from bmm_engine.commands.common import make_console
from bmm_engine.demo.archives import Archive
from bmm_engine.demo.data import Sizes, load_tasks
from bmm_engine.demo.narrator import Narrator
from bmm_engine.demo.train import Settings, train_experts

cache, base, output, pins, interval = sys.argv[1:]
archives = {name: Archive(**pin) for name, pin in json.loads(pins).items()}
with Narrator(make_console(), interval=float(interval)) as narrator:
    tasks = load_tasks(Path(cache), sizes=Sizes(20, 8, 6, 10), **archives)[:2]
    rates = zip(tasks, (1e-3, float("inf")))
    settings = {task.name: Settings(epochs=300, batch_size=4, learning_rate=rate) for task, rate in rates}
    with narrator.stage("fine-tuning"):
        train_experts(tasks, Path(base), Path(output), settings=settings, workers=1)
"""
INTERVAL_S = 1.5


def told(archives: dict[str, Any], base: Path, output: Path) -> tuple[list[tuple[float, str]], str, int]:
    """(when, line) of all that a run in a pipe says, what it says on standard error, and its exit status."""
    pins = json.dumps({name: asdict(pin) for name, pin in archives.items() if name != "cache_dir"})
    arguments = [str(archives["cache_dir"]), str(base), str(output), pins, str(INTERVAL_S)]
    with subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [(time.monotonic(), line.rstrip("\n")) for line in process.stdout]
        return lines, process.stderr.read(), process.wait()


def test_in_a_pipe_a_run_is_never_silent_for_long_and_fails_as_ever(
    archives: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    lines, errors, status = told(archives, tiny_base, tmp_path / "experts")
    assert status == 1
    assert "TrainingError: the loss of the expert for newsgroups is nan: lower its learning rate" in errors
    assert [folder.name for folder in (tmp_path / "experts").iterdir()] == ["reuters"]

    assert lines[-1][0] - lines[0][0] > INTERVAL_S, "too short a run to tell"
    assert max(later - earlier for (earlier, _), (later, _) in pairwise(lines)) <= INTERVAL_S
    assert all(re.match(r"\[ *\d+ s\] fine-tuning", line) for _, line in lines)
    said = [match for _, line in lines if (match := re.search(r"reuters, epoch (\d+) of 300, step \d of 5", line))]
    assert said, lines
    assert [int(match[1]) for match in said] == sorted(int(match[1]) for match in said)
    assert not any("done in" in line for _, line in lines)
    assert "\x1b" not in "".join(line for _, line in lines)


def test_lines_say_where_loops_are() -> None:
    console = Console(file=(file := io.StringIO()), width=40)
    with Narrator(console, interval=0.1) as narrator, narrator.stage("a stage"):
        for _ in track(range(3), "outer", show=False):
            for _ in track(iter("ab"), "inner", show=False):
                time.sleep(0.1)
    text = file.getvalue()
    assert re.search(r"a stage, \d+ s: outer, step 1 of 3; inner, step [01]\n", text)
    assert "a stage: done in" in text.splitlines()[-1]


def test_on_a_terminal_bars_are_drawn_and_vanish() -> None:
    console = Console(file=(file := io.StringIO()), width=100, force_terminal=True)
    with Narrator(console) as narrator:
        with narrator.stage("a stage"):
            for _ in track(range(3), "loop", show=False):
                time.sleep(0.25)
        assert list(narrator.seconds) == ["a stage"]
    text = file.getvalue()
    assert re.search(r"loop.*[12]/3", text)
    assert "a stage: done in" in text
    assert "at work" not in text

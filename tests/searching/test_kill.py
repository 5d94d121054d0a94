"""SIGKILL at random moments: the same command goes on, and ends with the trials of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from tests.searching.judged import judged_recipe

KILLS = int(os.environ.get("BMM_KILLS", "1"))
TRIALS = 8


@pytest.fixture
def project(tmp_path, monkeypatch):
    judged_recipe(tmp_path, monkeypatch, {"trials": TRIALS, "anchors": ["average", "ties"]}, anchor="ties")
    monkeypatch.setenv("JUDGE_SECONDS", "0.05")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(output, *options):
    command = [sys.executable, "-c", "from bmm_engine.cli import main; main()", "search", "recipe.yaml", "-o", output]
    command.append("--allow-code")  # the judge of the recipe
    return subprocess.Popen([*command, "--json", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return json.loads(out)


def trials(folder):
    with sqlite3.connect(folder / "trials.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return connection.execute(
            "SELECT number, kind, parameters, state, value FROM trials ORDER BY number"
        ).fetchall()


@pytest.mark.slow
@pytest.mark.timeout(300 + 60 * KILLS)
def test_killed_at_random_moments_a_search_ends_as_if_it_had_not_been(project):
    started = time.monotonic()
    whole = finish(start("whole"))
    duration = time.monotonic() - started
    rng = random.Random(KILLS)
    finished: dict[int, tuple] = {}
    for _ in range(KILLS):
        process = start("parts")
        time.sleep(rng.uniform(0.2, 1.0) * duration)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (project / "parts.study" / "trials.sqlite").exists():
            now = {row[0]: row for row in trials(project / "parts.study") if row[3] == "finished"}
            assert finished.items() <= now.items()  # what was finished stays
            finished = now
    parts = finish(start("parts"))
    assert trials(project / "parts.study") == trials(project / "whole.study")
    assert len(trials(project / "parts.study")) == TRIALS == parts["trials"]
    assert parts["best"] == whole["best"]
    for name in ("whole", "parts"):
        assert not [p for p in project.iterdir() if p.name.startswith(f".{name}")]
    assert (project / "parts" / "model.safetensors").read_bytes() == (
        project / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_second_process_is_refused_or_joins(project, monkeypatch):
    monkeypatch.setenv("JUDGE_SECONDS", "0.4")
    driver = start("out", "--trials", "24")
    study = project / "out.study" / "trials.sqlite"
    while not study.exists() and driver.poll() is None:
        time.sleep(0.1)
    refused = start("out", "--trials", "24")
    joined = start("out", "--join")
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "drives this search already" in err
    assert "--join" in err
    result = finish(driver)
    done = finish(joined)
    assert result["trials"] == 24
    with sqlite3.connect(study) as connection:
        by_worker = dict(connection.execute("SELECT worker, count(*) FROM trials GROUP BY worker").fetchall())
    assert by_worker == {"driver": 24 - done["trials"], "worker-1": done["trials"]}
    assert done["trials"] > 0

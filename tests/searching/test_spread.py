"""A search over several workers: repeatable in batches, whoever runs them, and nothing lost with a worker."""

from __future__ import annotations

import threading
import time

import psutil
import pytest

from bmm_engine.recipe.recipe import Recipe
from bmm_engine.searching.run import search_recipe
from bmm_engine.searching.study import Study
from tests.searching.judged import judged_recipe


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    path = judged_recipe(tmp_path, monkeypatch, {"trials": 10, "schedule": "synchronous"})
    monkeypatch.syspath_prepend(tmp_path)
    return Recipe.load(path)


def trials(folder):
    with Study.open(folder, readonly=True) as study:
        return [(t.kind, t.parameters, t.state, t.value) for t in study.trials()]


@pytest.mark.slow
def test_a_worker_that_is_killed_gives_its_trial_back(recipe, tmp_path, monkeypatch):
    quiet = search_recipe(recipe, tmp_path / "quiet", workers=2, write_merge=False)
    monkeypatch.setenv("JUDGE_SECONDS", "0.2")
    killed, before = [], {c.pid for c in psutil.Process().children(recursive=True)}

    def kill_one():
        database = tmp_path / "disturbed.study" / "trials.sqlite"
        while not database.exists() or len(trials(database.parent)) < 4:
            time.sleep(0.05)
        child = workers(before)[0]
        killed.append(child.pid)
        child.kill()

    thread = threading.Thread(target=kill_one)
    thread.start()
    disturbed = search_recipe(recipe, tmp_path / "disturbed", workers=2, write_merge=False)
    thread.join()
    assert killed
    assert trials(tmp_path / "disturbed.study") == trials(tmp_path / "quiet.study")
    assert disturbed.best.parameters == quiet.best.parameters
    assert not workers(before)


def workers(before):
    """Processes that were started since `before` and live, but for multiprocessing's own."""
    own = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    return [c for c in own if c.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(c.cmdline())]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_runs_the_same_batches_as_local_processes(recipe, tmp_path):
    pytest.importorskip("ray")
    local = search_recipe(recipe, tmp_path / "local", workers=2, write_merge=False)
    spread = search_recipe(recipe, tmp_path / "spread", workers=2, ray="local", write_merge=False)
    assert trials(tmp_path / "spread.study") == trials(tmp_path / "local.study")
    assert spread.best.parameters == local.best.parameters

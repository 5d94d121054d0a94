"""Trials in the mode sequential: what is evaluated is what `merge_sequential` gives, and the experts are run once."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bmm_engine import merge_sequential, search
from bmm_engine.executors import open_executor
from bmm_engine.merging.factors import Factors
from bmm_engine.merging.sources import Models
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.sections import SearchRecipe
from bmm_engine.recipe.settings import MergeSettings, SequentialOptions
from bmm_engine.searching.problem import FunctionTasks, Problem
from bmm_engine.searching.run import search_recipe
from bmm_engine.searching.sequential_trial import SequentialWriter
from bmm_engine.searching.session import prepare
from bmm_engine.searching.space import Candidate
from bmm_engine.sequential.passage import Passage
from bmm_engine.statistics.sets import Statistics
from tests.tiny import family, fine_tune, make_base, make_batches


def problem_of(architecture, options, **search):
    base = make_base(architecture)
    experts = [fine_tune(base, seed) for seed in (1, 2)]
    batches = [make_batches(architecture, 5 + i) for i in range(2)]
    tasks = FunctionTasks(base, experts, ("a", "b"), lambda model, task: 1.0)
    chosen = {name: (name, {}) for name in ("average", "ties")}
    settings = MergeSettings(mode="sequential", task_weights="energy", sequential=options)
    walk = Statistics(batches=tuple(batches))
    models = Models.open(base, experts)
    return Problem(models, settings, Statistics(), tasks, SearchRecipe(**search), chosen, walk=lambda: walk)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize(
    "options",
    [SequentialOptions(), SequentialOptions(norms="fit", sweeps=2, hidden_memory=0)],
    ids=["defaults", "norms and sweeps"],
)
def test_a_written_candidate_is_the_sequential_merge_it_stands_for(architecture, options, monkeypatch):
    problem = problem_of(architecture, options, groups="role_depth", depth_bins=2, scales="group")
    with open_executor() as executor:
        prepared = prepare(problem, lambda: problem, executor)
    assert not prepared.groups
    live = problem.tasks.live(problem.plan, "cpu")
    writer = SequentialWriter(problem, live, Factors([], prepared.shared.tensors()), "cpu")
    names = [g.name for g in problem.groups]
    ridges = {name: 10.0 ** (i % 4 - 2) for i, name in enumerate(names)}
    ones, scales = dict.fromkeys(names, 1.0), {name: 0.8 + 0.1 * i for i, name in enumerate(names)}
    whose = []
    through = Passage.through
    monkeypatch.setattr(Passage, "through", lambda self, *a: (whose.append(self.hidden.name), through(self, *a))[1])
    for number, candidate in enumerate(
        [
            Candidate(
                "average", {**ridges, names[0]: math.inf}, ones, "energy"
            ),  # an input with nothing to solve comes first
            Candidate("average", ridges, ones, "energy"),
            Candidate("ties", {**ridges, names[-1]: math.inf}, scales, "none"),
            Candidate("ties", dict.fromkeys(names, math.inf), scales, "energy"),
            Candidate("average", ridges, ones, (1.0, 2.0)),
        ]
    ):
        whose.clear()
        writer.write(candidate)
        assert any(name.startswith("expert") for name in whose) == (number == 0)
        merged = problem.merge(candidate)
        for name, tensor in live.parameters.items():
            assert torch.equal(tensor, merged[name]), (number, name)


def test_a_search_in_memory(tmp_path):
    base = make_base("gpt2")
    experts = [fine_tune(base, seed) for seed in (1, 2)]
    batches = [make_batches("gpt2", 5 + i) for i in range(2)]

    def judge(model, task):
        weight = dict(model.named_parameters())["transformer.h.1.mlp.c_fc.weight"]
        return 1 / (1 + float(weight.norm()))

    found = search(
        base, experts, judge, batches=batches, sequential={"sweeps": 2}, trials=4, groups="role", task_weights="energy"
    )
    again = merge_sequential(base, experts, batches, sweeps=2, **found.arguments).tensors
    assert all(torch.equal(found.tensors[name], again[name]) for name in again)
    assert found.trials == 4


def test_a_recipe_is_searched_and_its_best_trial_is_what_is_written(tmp_path, monkeypatch):
    family("bert", tmp_path)
    (tmp_path / "jury.py").write_text(
        "def score(model, task):\n"
        "    weight = dict(model.named_parameters())['bert.encoder.layer.1.output.dense.weight']\n"
        "    return 1 / (1 + float(weight.norm()))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for t in range(2):
        own = make_batches("bert", 10 + t)
        save_file({k: torch.cat([b[k] for b in own]) for k in own[0]}, tmp_path / f"data-{t}.safetensors")
    raw = {
        "base": "base",
        "experts": [{"model": f"expert-{t}", "calibration": f"data-{t}.safetensors"} for t in range(2)],
        "mode": "sequential",
        "evaluation": {"kind": "function", "function": "jury:score"},
        "search": {"trials": 4, "groups": "role", "anchors": ["average", "ties"]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    said = []
    result = search_recipe(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "out", report=said.append)
    assert any("every trial walks through the network" in line for line in said)
    assert not (tmp_path / "out.study" / "grams").exists()
    best = Recipe.load(result.recipe)
    assert best.mode == "sequential"
    assert best.task_weights == "energy"
    weight = load_file(tmp_path / "out" / "model.safetensors")["bert.encoder.layer.1.output.dense.weight"]
    assert abs(1 / (1 + float(weight.norm())) - next(iter(result.best.scores.values())).value) < 1e-9

"""Merges with a filter against the float64 references, and what goes with a filter and what does not."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import bmm_engine as bmm
from bmm_engine.errors import ConfigError
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.searching.run import search_recipe
from tests.reference_merge import reference_merge
from tests.reference_sequential import reference_sequential
from tests.searching.judged import judged_recipe
from tests.sequential.test_merge import assert_close, body, double, problem
from tests.tiny import family, fine_tune, make_base, make_batches


def first(s, k):
    return torch.arange(len(s)) < k


# Options, and the filter as a function of the eigenvalues, largest first, and lam.
FILTERS = {
    "exponential": ({"filter": "exponential"}, lambda s, lam: 1 - torch.exp(-s / lam)),
    "truncated": ({"filter": "truncated"}, lambda s, lam: (s > lam).double()),
    "swudi": (
        {"filter": "exponential", "directions": 0.65},
        lambda s, lam: (1 - torch.exp(-s / lam)) * first(s, round(0.65 * len(s))),
    ),
    "swudi-a": (
        {"filter": "truncated", "directions": "participation"},
        lambda s, lam: first(s, round(float(s.abs().sqrt().sum() ** 2 / s.sum()))).double(),
    ),
    "cut ridge": ({"directions": 7}, lambda s, lam: s / (s + lam) * first(s, 7)),
}
each_filter = pytest.mark.parametrize("chosen", FILTERS)


def doubles(architecture):
    base = make_base(architecture)
    experts = [fine_tune(base, seed, 0.3 * seed).double() for seed in (1, 2)]
    return base.double(), experts, [double(make_batches(architecture, 10 + t)) for t in range(2)]


SOURCES = {
    "data, overshot": {"gram_source": "data", "scale": 1.3, "prior": 1.5},
    "biases, energy": {"gram_source": "data", "fit_bias": True, "energy": True},
    "data-free": {"gram_source": "task_vectors"},
    "hybrid": {"gram_source": "hybrid"},
}


# Each filter with each source, on one of the architectures.
@pytest.mark.parametrize(
    ("architecture", "more", "chosen"),
    [
        pytest.param(("bert", "gpt2")[(i + j) % 2], SOURCES[source], chosen, id=f"{source}-{chosen}")
        for i, source in enumerate(SOURCES)
        for j, chosen in enumerate(FILTERS)
    ],
)
def test_a_plain_merge_is_the_formula(architecture, more, chosen):
    base, experts, batches = doubles(architecture)
    options, response = FILTERS[chosen]
    truth = reference_merge(base, experts, batches, alpha=0.2, response=response, **more)
    source = more["gram_source"]
    grams = (
        [bmm.collect_grams(e, b, progress=False) for e, b in zip(experts, batches)]
        if source != "task_vectors"
        else source
    )
    given = {"scale": more.get("scale", 1.0), "fit_bias": more.get("fit_bias", False), "alpha": 0.2, "progress": False}
    given["prior"] = more.get("prior", 1.0)
    given["task_weights"] = "energy" if more.get("energy") else None
    found = bmm.merge(base, experts, grams=grams, hybrid=0.5 if source == "hybrid" else None, **given, **options)
    assert_close(found.tensors, truth.state_dict(), 1e-9)
    assert all(record.jitter == 0 for record in found.modules)


@pytest.mark.parametrize(
    ("anchor", "chosen"), [(("task_arithmetic", "tsv_m")[i % 2], chosen) for i, chosen in enumerate(FILTERS)]
)
def test_any_anchor_will_do_and_at_an_infinite_ridge_it_is_the_result(anchor, chosen):
    base, experts, _ = doubles("bert")
    options, response = FILTERS[chosen]
    prior = bmm.merge(base, experts, anchor=anchor, alpha=math.inf, progress=False).tensors
    still = bmm.merge(base, experts, anchor=anchor, alpha=math.inf, progress=False, **options).tensors
    assert all(torch.equal(tensor, prior[name]) for name, tensor in still.items())
    found = bmm.merge(base, experts, anchor=anchor, alpha=0.2, progress=False, **options).tensors
    name = "bert.encoder.layer.1.output.dense.weight"
    w, *weights = (m.state_dict()[name] for m in (base, *experts))
    grams = [(own - w).T @ (own - w) / (own - w).square().sum() for own in weights]
    u, s, _ = torch.linalg.svd(sum(grams))
    r = sum((own - prior[name]) @ gram for own, gram in zip(weights, grams))
    factors = torch.where(s > 1e-13 * s[0], response(s, 0.2 * s.sum() / len(s)) / s, 0.0)
    truth = prior[name] + (r @ u * factors) @ u.T
    assert float((found[name] - truth).abs().max()) < 1e-9 * float(truth.abs().max())


@each_filter
def test_the_order_of_the_experts_does_not_matter_to_a_bit(chosen):
    base, experts, _ = doubles("bert")
    options = {"progress": False, "alpha": 0.1, **FILTERS[chosen][0]}
    one, other = (bmm.merge(base, own, **options).tensors for own in (experts, experts[::-1]))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(("architecture", "chosen"), [("bert", "exponential"), ("bert", "swudi-a"), ("gpt2", "swudi")])
def test_a_walk_is_the_formula(architecture, chosen):
    base, experts, batches = problem(architecture)
    options, response = FILTERS[chosen]
    more = {"alpha": 0.2, "mean_weight": 2.0, "prior": 1.5}
    batches = [double(own) for own in batches]
    truth = reference_sequential(base, experts, batches, response=response, **more)
    wide = [copy.deepcopy(m).double() for m in (base, *experts)]
    found = bmm.merge_sequential(wide[0], wide[1:], batches, task_weights="energy", progress=False, **more, **options)
    assert_close(found.tensors, truth, 1e-9)


def test_weighted_outputs_go_with_kept_directions_and_not_with_gradient_descent():
    base, experts, batches = doubles("bert")
    weights = [bmm.collect_sensitivity(e, b, progress=False) for e, b in zip(experts, batches)]
    grams = [bmm.collect_grams(e, b, progress=False) for e, b in zip(experts, batches)]
    options = {"sensitivities": weights, "progress": False, "alpha": 0.1}

    def plain(**own):
        return bmm.merge(base, experts, grams=grams, **options, **own).tensors

    def walked(**own):
        return bmm.merge_sequential(base, experts, batches, **options, **own).tensors

    everything = plain()
    assert_close(plain(directions=1.0), everything, 1e-8)
    for merge in (plain, walked):
        few = merge(filter="truncated", directions=4)
        assert max(float((few[name] - everything[name]).abs().max()) for name in body(few)) > 1e-3
        with pytest.raises(ConfigError, match="filter 'exponential' is for outputs that count alike"):
            merge(filter="exponential")
    with pytest.raises(ConfigError, match="filter 'exponential' is for outputs that count alike"):
        bmm.search(base, experts, lambda model, task: 1.0, batches=batches, sensitivities=weights, filter="exponential")
    for own in ({"filter": "truncated"}, {"directions": 3}):
        with pytest.raises(ConfigError, match=r"posterior are for the plain ridge.*leave both out"):
            bmm.merge(base, experts, grams=grams, posterior=bmm.Posterior(), progress=False, **own)


@pytest.fixture
def folder(tmp_path):
    """A classifier and two fine-tunes of it with calibration, which are weighed by default."""
    family("bert", tmp_path)
    for t in range(2):
        own = make_batches("bert", 10 + t)
        save_file({k: torch.cat([b[k] for b in own]) for k in own[0]}, tmp_path / f"data-{t}.safetensors")
    return tmp_path


def recipe_of(folder, **more):
    experts = [{"model": f"expert-{t}", "calibration": f"data-{t}.safetensors"} for t in range(2)]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"base": "base", "experts": experts, **more}))
    return Recipe.load(folder / "recipe.yaml")


@pytest.mark.parametrize("mode", ["plain", "sequential"])
def test_recipes_of_classifiers_choose_output_weights_that_go_with_the_filter(mode, folder):
    said = []
    result = run_recipe(
        recipe_of(folder, mode=mode, filter="exponential", directions=0.65), folder / "out", report=said.append
    )
    assert "output_weights: none, since filter is 'exponential'" in said
    record = json.loads((folder / "out" / "bmm_merge.json").read_text())
    assert (record["recipe"]["filter"], record["recipe"]["directions"]) == ("exponential", 0.65)
    run_recipe(recipe_of(folder, mode=mode, filter="truncated", directions=4), folder / "few", report=said.append)
    assert "output_weights: sensitivity, since every expert is a classifier" in said
    with pytest.raises(ConfigError, match=r"filter 'exponential'.*output_weights: none"):
        recipe_of(folder, mode=mode, filter="exponential", output_weights="sensitivity")
    assert result.path == folder / "out"


def test_the_best_recipe_of_a_search_merges_to_what_the_search_wrote(tmp_path, monkeypatch):
    path = judged_recipe(tmp_path, monkeypatch, {"trials": 4}, filter="truncated", directions="participation")
    monkeypatch.syspath_prepend(tmp_path)
    # Away from the anchor, which is the mean of the experts.
    (tmp_path / "judge.py").write_text(
        "def score(model, task):\n    return float(dict(model.named_parameters())['bert.encoder.layer.0.intermediate.dense.weight'].norm())\n"
    )
    found = search_recipe(Recipe.load(path), tmp_path / "out", report=lambda line: None)
    best = Recipe.load(found.recipe)
    assert (best.filter, best.directions) == ("truncated", "participation")
    run_recipe(best, tmp_path / "again", report=lambda line: None)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert not math.isinf(min(map(float, found.best.parameters["alpha"].values())))

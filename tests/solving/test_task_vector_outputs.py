"""Outputs weighed without data: `U U^T` of an expert's task vector in the place of its measured sensitivity."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import bmm_engine as bmm
from bmm_engine.checkpoint import StateDictSource
from bmm_engine.checkpoint.adapter import AdapterSource
from bmm_engine.errors import ConfigError
from bmm_engine.merging.groups import OpenGroup
from bmm_engine.merging.inputs import Inputs
from bmm_engine.ops.lowrank import LowRank
from bmm_engine.pipeline.models import open_models
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.pipeline.sampling import draw
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.searching.workers import with_search_weights
from bmm_engine.solving import output_metric
from bmm_engine.solving.output_metric import OutputMetric, task_vector_metrics
from tests.checkpoint.test_adapter import write
from tests.numerics import relative_error
from tests.reference_merge import linear_names, metrics_of, reference_merge
from tests.reference_sequential import reference_sequential
from tests.sequential.test_merge import assert_close, body, problem
from tests.sequential.test_merge import double as double_batches
from tests.sequential.test_solve import rows
from tests.tiny import family, fine_tune, make_base, make_batches

OUTPUTS = "task_vectors"


def truth_of(u, rank=output_metric.RANK):
    """`U U^T` (out, out) with the mean of all but its `rank` largest eigenvalues in the place of each of them."""
    values, vectors = torch.linalg.eigh(u @ u.T)
    if len(values) > rank:
        values[:-rank] = values[:-rank].mean()
    return vectors @ values.diag() @ vectors.T


@torch.no_grad()
def outer(base, experts):
    """What `U U^T` is of every module, by expert."""
    return [
        {
            name: (u.T @ u if stored_transposed else u @ u.T)
            for name, stored_transposed in linear_names(base).items()
            for u in [expert.get_submodule(name).weight.double() - base.get_submodule(name).weight.double()]
        }
        for expert in experts
    ]


@pytest.fixture(scope="module")
def models():
    """A tiny BERT with a classifier, two fine-tunes of it, and Grams of these."""
    base = make_base("bert")
    experts = [fine_tune(base, seed, 0.05 * seed) for seed in (1, 2)]
    batches = [make_batches("bert", 10 + t) for t in range(2)]
    return base, experts, batches, [bmm.collect_grams(e, b, progress=False) for e, b in zip(experts, batches)]


@pytest.mark.parametrize(("outputs", "inputs"), [(80, 90), (90, 70), (90, 30), (40, 90), (20, 5)])
def test_the_metric_is_that_of_the_outer_product(outputs, inputs):
    g = torch.Generator().manual_seed(0)
    u = rows(g, outputs, inputs)
    (found,) = task_vector_metrics([u], 0.6, "module")
    truth = 0.6 * outputs / u.square().sum() * truth_of(u) + 0.4 * torch.eye(outputs).double()
    assert relative_error(found.dense(), truth) < 1e-12
    assert found.dense().trace() == pytest.approx(outputs)
    (narrow,) = task_vector_metrics([u.float()], 0.6, "module")
    assert relative_error(narrow.dense(), truth) < 1e-6


def test_modules_weighed_together_are_scaled_together_and_a_zero_one_counts_alike():
    g = torch.Generator().manual_seed(1)
    given = [rows(g, 70, 8), 3 * rows(g, 5, 8)]
    found = task_vector_metrics(given, 0.75, "module")
    truth = metrics_of([{str(i): truth_of(u) for i, u in enumerate(given)}], ["0", "1"], 0.75, 1)[0]
    for own, dense in zip(found, truth.values()):
        assert relative_error(own.dense(), dense) < 1e-12
    still, moved = task_vector_metrics([torch.zeros(70, 8), given[1]], 0.75, "module")
    assert relative_error(still.dense(), 0.25 * torch.eye(70).double()) < 1e-15
    assert moved.dense().trace() == pytest.approx(75 - 0.25 * 70)
    (alone,) = task_vector_metrics([torch.zeros(70, 8)], 0.75, "module")
    assert torch.equal(alone.dense(), torch.eye(70))
    for own in task_vector_metrics(given, 0.0, "module"):
        assert relative_error(own.dense(), torch.eye(own.outputs).double()) < 1e-15


@pytest.mark.parametrize(("outputs", "inputs"), [(100, 20), (20, 100), (100, 90)])
def test_of_factors_it_is_that_of_their_product(outputs, inputs):
    g = torch.Generator().manual_seed(2)
    product = LowRank(rows(g, outputs, 3), rows(g, 3, inputs))
    (found,), (truth,) = (task_vector_metrics([own], 0.75, "module") for own in (product, product.dense()))
    assert relative_error(found.dense(), truth.dense()) < 1e-12
    if outputs > output_metric.RANK:
        assert found.directions.shape == (outputs, 3)


def test_of_wide_task_vectors_the_directions_are_iterated_for(monkeypatch):
    g = torch.Generator().manual_seed(3)
    u = rows(g, 120, 150) @ torch.diag(0.8 ** torch.arange(150).double())
    monkeypatch.setattr(output_metric, "EXACT", 50)
    assert relative_error(OutputMetric.of_factor(u, 20).dense(), truth_of(u, 20)) < 1e-3
    assert relative_error(OutputMetric.of_factor(u.float(), 20).dense(), truth_of(u, 20)) < 1e-3
    low = rows(g, 120, 10) @ rows(g, 10, 150)
    assert relative_error(OutputMetric.of_factor(low, 20).dense(), low @ low.T) < 1e-12


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"energy": True, "fit_bias": True, "scale": 1.2}, {"gram_source": "task_vectors"}, {"gram_source": "hybrid"}],
    ids=["data", "energy, biases", "data-free", "hybrid"],
)
def test_a_plain_merge_is_the_formula(architecture, options):
    base = make_base(architecture)
    experts = [fine_tune(base, seed, 0.3 * seed).double() for seed in (1, 2)]
    base = base.double()
    batches = [double_batches(make_batches(architecture, 10 + t)) for t in range(2)]
    truth = reference_merge(
        base,
        experts,
        batches,
        alpha=0.1,
        sensitivities=outer(base, experts),
        sensitivity_share=0.6,
        **options,
    )
    source = options.get("gram_source", "data")
    grams = [bmm.collect_grams(e, b, progress=False) for e, b in zip(experts, batches)]  # kept in float32
    found = bmm.merge(
        base,
        experts,
        alpha=0.1,
        grams="task_vectors" if source == "task_vectors" else grams,
        hybrid=0.5 if source == "hybrid" else None,
        task_weights="energy" if options.get("energy") else None,
        fit_bias=options.get("fit_bias", False),
        scale=options.get("scale", 1.0),
        sensitivities=OUTPUTS,
        sensitivity_share=0.6,
        progress=False,
    )
    assert_close(found.tensors, truth.state_dict(), 1e-9 if source == "task_vectors" else 1e-6)
    assert found.plan.statistics.output_weights == OUTPUTS


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_walk_is_the_formula(architecture):
    base, experts, batches = problem(architecture)
    base, *experts = (m.double() for m in (base, *experts))
    batches = [double_batches(own) for own in batches]
    options = {"alpha": 0.1, "mean_weight": 2.0}
    truth = reference_sequential(base, experts, batches, sensitivities=outer(base, experts), share=0.6, **options)
    found = bmm.merge_sequential(
        base, experts, batches, sensitivities=OUTPUTS, sensitivity_share=0.6, progress=False, **options
    )
    assert_close(found.tensors, truth, 1e-6)


def test_the_laws(models):
    """One expert, or equal ones, give the expert; a share of 0 is the merge without weights; experts come in any order, to the bit."""
    base, experts, batches, grams = models
    options = {"alpha": 1e-6, "progress": False}
    expert = {k: v.double() for k, v in experts[0].state_dict().items()}
    for count in (1, 2):
        same = ([experts[0]] * count, [grams[0]] * count, [batches[0]] * count)
        assert_close(bmm.merge(base, same[0], grams=same[1], sensitivities=OUTPUTS, **options).tensors, expert, 1e-3)
        walked = bmm.merge_sequential(base, same[0], same[2], sensitivities=OUTPUTS, **options).tensors
        assert_close(walked, expert, 1e-3)

    def merged(order=(0, 1), **given):
        pick = {"grams": [grams[t] for t in order]}
        return bmm.merge(base, [experts[t] for t in order], alpha=0.1, progress=False, **{**pick, **given}).tensors

    plain, weighed = merged(), merged(sensitivities=OUTPUTS)
    alike = merged(sensitivities=OUTPUTS, sensitivity_share=0.0)
    assert_close(alike, {k: v.double() for k, v in plain.items()}, 1e-6)
    assert max(relative_error(weighed[name], plain[name].double()) for name in body(plain)) > 1e-3
    for given in ({}, {"grams": "task_vectors"}):
        swapped = merged((1, 0), sensitivities=OUTPUTS, **given)
        listed = merged(sensitivities=OUTPUTS, **given)
        assert all(torch.equal(swapped[name], listed[name]) for name in body(listed))


def test_adapters_are_weighed_as_the_models_they_make(tmp_path):
    torch.manual_seed(0)
    base = {"layer.weight": torch.randn(80, 12).double(), "other.weight": torch.randn(12, 80).double()}
    adapters, whole = [], []
    for t in range(2):
        tensors = {}
        for name, weight in base.items():
            own = name.removesuffix(".weight")
            tensors[f"{own}.lora_A.weight"] = torch.randn(4, weight.shape[1])
            tensors[f"{own}.lora_B.weight"] = torch.randn(weight.shape[0], 4)
        adapters.append(AdapterSource(StateDictSource(base), write(tmp_path / str(t), tensors)))
        whole.append({name: adapters[-1].load(name) for name in base})
    options = {"modules": ["*"], "task_weights": "energy", "sensitivities": OUTPUTS, "progress": False}
    got, truth = (bmm.merge(base, own, **options) for own in (adapters, whole))
    for name, tensor in truth.tensors.items():
        assert relative_error(got.tensors[name], tensor) < 1e-9
    group = got.plan.groups[0]
    assert isinstance(OpenGroup(Inputs(got.plan), group).task_vector(0, group.members[0]), LowRank)


def test_what_does_not_go_with_it_is_refused(models):
    base, experts, batches, grams = models
    given = {"grams": grams, "sensitivities": OUTPUTS, "progress": False}
    with pytest.raises(ConfigError, match="outputs that count alike"):
        bmm.merge(base, experts, posterior=bmm.Posterior(temperature=1.0), **given)
    with pytest.raises(ConfigError, match=r"'exponential' is for outputs that count alike.*output_weights: none"):
        bmm.merge(base, experts, filter="exponential", **given)
    with pytest.raises(ConfigError, match=r"sensitivities must be 'task_vectors' or a list.*not 'task_vector'"):
        bmm.merge(base, experts, **{**given, "sensitivities": "task_vector"})
    with pytest.raises(ConfigError, match="sensitivity_share"):
        bmm.merge(base, experts, sensitivity_share=1.0, **given)
    with pytest.raises(ConfigError, match="needs the sensitivities of every expert"):
        bmm.merge(base, experts, anchor="epimer", anchor_parameters={"metric": "kfac"}, **given)
    with pytest.raises(ConfigError, match="outputs are weighed by task vectors here"):
        bmm.merge_sequential(
            base, experts, batches, sensitivities=OUTPUTS, sweeps=2, remeasure=lambda tensors, t: None, progress=False
        )
    assert bmm.plan_merge(base, experts, sensitivities=OUTPUTS).statistics.output_weights == OUTPUTS


def test_a_search_that_walks_weighs_so_and_a_plain_one_refuses(models, tmp_path):
    base, experts, batches, _ = models
    given = {"trials": 1, "tasks": ["a"], "expert_scores": {"a": 1.0}}
    found = bmm.search(base, experts, lambda model, task: 1.0, batches=batches, sensitivities=OUTPUTS, **given)
    walked = bmm.merge_sequential(base, experts, batches, sensitivities=OUTPUTS, progress=False, **found.arguments)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in walked.tensors.items())
    with pytest.raises(ConfigError, match="search in the mode sequential"):
        bmm.search(base, experts, lambda model, task: 1.0, sensitivities=OUTPUTS)
    _, _, base_path, paths = family("bert", tmp_path)
    made = Recipe.parse({"base": str(base_path), "experts": list(map(str, paths)), "output_weights": OUTPUTS})
    with pytest.raises(ConfigError, match="output_weights: none"):
        with_search_weights(made, open_models(made), lambda line: None)


def test_in_a_recipe(tmp_path):
    base, experts, base_path, paths = family("bert", tmp_path)

    def recipe(**keys):
        return Recipe.parse({"base": str(base_path), "experts": [str(p) for p in paths], **keys})

    made = recipe(output_weights=OUTPUTS, alpha=0.1, sensitivity_share=0.5)
    found = load_file(run_recipe(made, tmp_path / "out", progress=False).path / "model.safetensors")
    options = {"alpha": 0.1, "sensitivities": OUTPUTS, "sensitivity_share": 0.5, "shrinkage": 0.2, "progress": False}
    truth = bmm.merge(base, experts, **{**options, "task_weights": made.task_weights}).tensors
    assert all(torch.equal(found[name], truth[name]) for name in found)
    record = json.loads((tmp_path / "out" / "bmm_merge.json").read_text())
    assert record["recipe"]["output_weights"] == OUTPUTS
    bmm.merge(base, experts, output=tmp_path / "called", **options)
    assert json.loads((tmp_path / "called" / "bmm_merge.json").read_text())["recipe"]["output_weights"] == OUTPUTS
    with pytest.raises(ConfigError, match=r"'exponential' is for outputs that count alike"):
        recipe(output_weights=OUTPUTS, filter="exponential")
    with pytest.raises(ConfigError, match="output_weights: none"):
        draw(made, 1, output=tmp_path / "draws")

"""Sensitivities measured again between sweeps: a walk against the float64 reference, which measures by itself; recipes against keywords."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bmm_engine import collect_sensitivity, merge_sequential, search
from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from tests.numerics import relative_error
from tests.reference_sequential import reference_sequential
from tests.sequential.test_merge import HEADS, assert_close, body, double, problem
from tests.tiny import family, make_batches


def on_the_merged_network(experts, batches, seen=None):
    """(tensors, t) -> what `collect_sensitivity` finds on expert t's model with all tensors but the head's in it."""

    def measure(tensors, t):
        if seen is not None:
            seen.append((t, {name: tensor.clone() for name, tensor in tensors.items()}))
        model = copy.deepcopy(experts[t])
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS)}
        model.load_state_dict({**model.state_dict(), **own})
        return collect_sensitivity(model, batches[t], progress=False)

    return measure


@pytest.fixture(scope="module")
def wide():
    base, experts, batches = problem("bert")
    base, *experts = (m.double() for m in (base, *experts))
    own = [double(b) for b in batches]
    return base, experts, own, [collect_sensitivity(e, b, progress=False) for e, b in zip(experts, own)]


def test_it_is_the_formula_with_what_the_merged_network_depends_on(wide):
    base, experts, batches, sensitivities = wide
    measure, seen = on_the_merged_network(experts, batches), []
    options = {"alpha": 0.1, "sweeps": 2}
    truth = reference_sequential(
        base,
        experts,
        batches,
        output_hybrid=8 / (8 + sensitivities[0].samples),
        sensitivities=[own.tensors for own in sensitivities],
        remeasure=lambda tensors, t: measure(tensors, t).tensors,
        **options,
    )
    again = on_the_merged_network(experts, batches, seen)
    given = {"sensitivities": sensitivities, "progress": False, **options}
    found = merge_sequential(base, experts, batches, remeasure=again, **given)
    assert_close(found.tensors, truth, 1e-6)  # iterative solves
    assert [t for t, _ in seen] == [0, 1]
    first = merge_sequential(base, experts, batches, **{**given, "sweeps": 1}).tensors
    assert all(torch.equal(tensors[name], first[name]) for _, tensors in seen for name in tensors)
    without = merge_sequential(base, experts, batches, **given).tensors
    assert max(relative_error(without[name], found.tensors[name]) for name in body(without)) > 1e-3


def test_experts_that_are_the_merge_already_change_nothing(wide):
    """Measured at the merged network, which is the expert: the same sensitivities, so the same second sweep."""
    base, experts, batches, sensitivities = wide
    same = ([experts[0]] * 2, [batches[0]] * 2)
    again = on_the_merged_network(*same)
    options = {"sensitivities": sensitivities[:1] * 2, "sweeps": 2, "progress": False}
    found = merge_sequential(base, *same, remeasure=again, **options).tensors
    assert_close(found, experts[0].state_dict(), 1e-9)


@pytest.mark.parametrize("with_heads", [False, True], ids=["classifiers", "encoders with heads"])
def test_a_recipe_measures_with_each_experts_own_head(with_heads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, experts, _, paths = family("bert", tmp_path)
    batches = [make_batches("bert", 10 + t) for t in range(2)]
    entries = []
    for t, path in enumerate(paths):
        save_file({k: torch.cat([b[k] for b in batches[t]]) for k in batches[t][0]}, tmp_path / f"data-{t}.safetensors")
        entries.append({"model": path.name, "name": f"task {t}", "calibration": f"data-{t}.safetensors"})
        if with_heads:
            head = {"weight": experts[t].classifier.weight.detach(), "bias": experts[t].classifier.bias.detach()}
            save_file({k: v.clone() for k, v in head.items()}, tmp_path / f"head-{t}.safetensors")
            experts[t].bert.save_pretrained(path)
            entries[-1]["head"] = f"head-{t}.safetensors"
    if with_heads:
        base.bert.save_pretrained(tmp_path / "base")
    raw = {"base": "base", "experts": entries, "calibration": {"batch_size": 4}}
    raw["sequential"] = {"sweeps": 2, "remeasure": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    lines = []
    run_recipe(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "out", report=lines.append)
    assert sum("measured again at the merged network" in line for line in lines) == 2
    found = load_file(tmp_path / "out" / "model.safetensors")

    def logits(output, batch, t):
        hidden, mask = output.last_hidden_state, batch["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.linear(pooled, experts[t].classifier.weight, experts[t].classifier.bias)

    def measure(tensors, t):
        model = copy.deepcopy(experts[t].bert if with_heads else experts[t])
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS)}
        model.load_state_dict({**model.state_dict(), **own})
        given = {"logits": lambda output, batch: logits(output, batch, t)} if with_heads else {}
        return collect_sensitivity(model, batches[t], progress=False, **given)

    first = [measure({}, t) for t in range(2)]
    again = merge_sequential("base", paths, batches, sensitivities=first, sweeps=2, remeasure=measure, progress=False)
    for name, tensor in again.tensors.items():
        assert relative_error(found[name], tensor.double()) < 1e-5, name


def test_what_cannot_be_is_refused(wide):
    base, experts, batches, sensitivities = wide
    given = (base, experts, batches)
    weighed = {"sensitivities": sensitivities, "sweeps": 2, "progress": False}
    again = on_the_merged_network(experts, batches)
    for text, options in (
        ("sweeps is 1; say 2 or more", {"sensitivities": sensitivities, "remeasure": again}),
        ("outputs count alike here", {"sweeps": 2, "remeasure": again}),
        ("give a function", {**weighed, "remeasure": True}),
        ("remeasure = 'yes'", {**weighed, "remeasure": "yes"}),
        ("gave a dict for expert 0", {**weighed, "remeasure": lambda tensors, t: {}}),
    ):
        with pytest.raises(ConfigError, match=text):
            merge_sequential(*given, **options)

    def of_another(tensors, t):
        found = again(tensors, t)
        found.tensors = {name: value[:-1, :-1] for name, value in found.tensors.items()}
        return found

    with pytest.raises(ShapeMismatchError, match="the module gives 16 features"):
        merge_sequential(*given, remeasure=of_another, **weighed)
    with pytest.raises(ConfigError, match="a search does not measure sensitivities again"):
        search(
            base,
            experts,
            lambda model, task: 1.0,
            batches=batches,
            sensitivities=sensitivities,
            sequential={"sweeps": 2, "remeasure": again},
            trials=1,
        )

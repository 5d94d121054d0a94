"""The mode sequential in recipes, on the command line and in reports."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bmm_engine import SensitivitySet, collect_sensitivity, merge_sequential
from bmm_engine.cli import main
from bmm_engine.errors import ConfigError
from bmm_engine.pipeline import statistics as measure
from bmm_engine.pipeline.run import prepare_recipe, run_recipe
from bmm_engine.pipeline.sampling import draw
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.solving.posterior import Posterior
from tests.tiny import family, make_batches


@pytest.fixture
def project(tmp_path, monkeypatch):
    family("llama", tmp_path)
    for t in range(2):
        batches = make_batches("llama", 10 + t)
        save_file({k: torch.cat([b[k] for b in batches]) for k in batches[0]}, tmp_path / f"data-{t}.safetensors")
    experts = [{"model": f"expert-{t}", "name": f"task {t}", "calibration": f"data-{t}.safetensors"} for t in range(2)]
    write(tmp_path, {"base": "base", "experts": experts, "calibration": {"batch_size": 4}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, raw):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))


def change(folder, **keys):
    raw = {**yaml.safe_load((folder / "recipe.yaml").read_text()), **keys}
    write(folder, {k: v for k, v in raw.items() if v is not None})
    return Recipe.load(folder / "recipe.yaml")


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bmm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def test_a_recipe_does_what_the_function_does(project):
    options = {"norms": "fit", "sweeps": 2, "hidden_memory": 0, "hidden_dtype": "float32", "blocks": "*layers"}
    recipe = change(project, mode="sequential", sequential=options, anchor="ties", alpha=0.1)
    assert (recipe.task_weights, recipe.fit_bias, recipe.gram_source) == ("energy", True, "data")
    run_recipe(recipe, project / "out")
    batches = [make_batches("llama", 10 + t) for t in range(2)]
    paths = [project / f"expert-{t}" for t in range(2)]
    truth = merge_sequential(project / "base", paths, batches, anchor="ties", alpha=0.1, sweeps=2, norms="fit").tensors
    found = load_file(project / "out" / "model.safetensors")
    assert all(torch.equal(found[n], truth[n]) for n in found)
    record = json.loads((project / "out" / "bmm_merge.json").read_text())
    assert record["recipe"]["mode"] == "sequential"
    assert record["modules"]["solved_modules"] == 14
    stages = [own["stage"] for own in record["modules"]["inputs"]]
    assert stages[0] == "model.layers.0"
    assert stages[-1] == "after the blocks"  # the last norm
    for own in record["modules"]["inputs"]:
        assert len(own["before"]) == len(own["after"]) == len(own["task_weights"]) == 2


def test_few_samples_are_warned_of(project, monkeypatch):
    recipe, lines = change(project, mode="sequential"), []
    run_recipe(recipe, project / "few", report=lines.append)
    warnings = [line for line in lines if line.startswith("warning")]
    assert [recipe.expert_name(t) in warnings[t] and "say `mode: plain`" in warnings[t] for t in range(2)] == [
        True,
        True,
    ]
    monkeypatch.setattr(measure, "FEW_SAMPLES", 1)
    lines.clear()
    run_recipe(recipe, project / "enough", report=lines.append)
    assert not [line for line in lines if line.startswith("warning")]


def test_outputs_are_weighed_by_measured_sensitivities(project, monkeypatch, capsys):
    """Measured where a recipe's file is not there, kept in it, and read from it the next time; by the command too."""
    experts = yaml.safe_load((project / "recipe.yaml").read_text())["experts"]
    experts[0]["sensitivity"] = "kept.safetensors"
    recipe = change(
        project,
        mode="sequential",
        output_weights="sensitivity",
        sensitivity_share=0.6,
        experts=experts,
    )
    lines = []
    run_recipe(recipe, project / "out", report=lines.append)
    assert sum("sensitivities of 14 modules collected from data-" in line for line in lines) == 2
    batches = [make_batches("llama", 10 + t) for t in range(2)]
    paths = [project / f"expert-{t}" for t in range(2)]
    sets = [collect_sensitivity(AutoModelForCausalLM.from_pretrained(path), own) for path, own in zip(paths, batches)]
    truth = merge_sequential(project / "base", paths, batches, sensitivities=sets, sensitivity_share=0.6).tensors
    found = load_file(project / "out" / "model.safetensors")
    assert all(torch.equal(found[n], truth[n]) for n in found)
    record = json.loads((project / "out" / "bmm_merge.json").read_text())
    assert record["recipe"]["output_weights"] == "sensitivity"
    assert SensitivitySet.load(project / "kept.safetensors").digest() == sets[0].digest()

    again = []
    run_recipe(recipe, project / "again", report=again.append)
    assert sum("sensitivities from" in line for line in again) == 1
    assert (project / "again" / "model.safetensors").read_bytes() == (
        project / "out" / "model.safetensors"
    ).read_bytes()
    command = (
        "collect",
        "expert-0",
        "data-0.safetensors",
        "-o",
        "own.safetensors",
        "--batch-size",
        "4",
        "--sensitivity",
        "--json",
    )
    code, out, _ = run(monkeypatch, capsys, *command)
    assert code == 0
    assert json.loads(out)[0]["modules"] == 14
    assert SensitivitySet.load(project / "own.safetensors").digest() == sets[0].digest()
    code, _, err = run(monkeypatch, capsys, *command[:-1], "--fisher")
    assert code != 0
    assert "one at a time" in err


def test_what_does_not_go_with_the_mode_is_refused(project):
    experts = yaml.safe_load((project / "recipe.yaml").read_text())["experts"]
    for text, keys in (
        (
            "mode 'sequential' runs every expert on its own data; expert 'expert-1'",
            {"experts": [experts[0], "expert-1"]},
        ),
        ("gram_source 'task_vectors' does not go with it", {"gram_source": "task_vectors"}),
        ("unknown key 'sequential.sweep'; did you mean 'sweeps'?", {"sequential": {"sweep": 2}}),
        ("sequential.sweeps = 0", {"sequential": {"sweeps": 0}}),
        ("mode = 'serial'", {"mode": "serial"}),
    ):
        with pytest.raises(ConfigError) as found:
            change(project, **{"mode": "sequential", **keys})
        assert text in str(found.value)
        change(project, experts=experts, gram_source=None, sequential=None, mode=None) if "mode" not in keys else None
        write(project, {"base": "base", "experts": experts, "calibration": {"batch_size": 4}})
    with pytest.raises(ConfigError, match=r"sequential\.hidden_memory = 'much': size 'much'"):
        change(project, mode="sequential", sequential={"hidden_memory": "much"})
    recipe = change(project, mode="sequential", sequential=None)
    for call in (
        lambda: prepare_recipe(recipe).merge(posterior=Posterior()),
        lambda: draw(recipe, 1, output=project / "s"),
    ):
        with pytest.raises(ConfigError, match="draws from the posterior are for mode 'plain'"):
            call()


def test_the_command_merges_inspects_and_reports(project, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "out", "--sequential", "--json")
    assert code == 0
    summary = json.loads(out)
    assert summary["solved_modules"] == 14
    change(project, mode="sequential")
    code, out, err = run(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "again")
    assert code == 0
    assert "q_proj and 2 more: relative residual" in err
    assert "bmm report" in out
    same = [(project / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]
    code, out, _ = run(monkeypatch, capsys, "inspect", "recipe.yaml")
    assert code == 0
    assert "mode sequential" in out
    plan = json.loads(run(monkeypatch, capsys, "inspect", "recipe.yaml", "--json")[1])
    assert plan["mode"] == "sequential"
    assert not plan["grams_to_collect"]

    code, out, _ = run(monkeypatch, capsys, "report", "out", "--json")
    assert code == 0
    page = (project / "out.report" / "report.html").read_text()
    assert "task 0" in page
    assert "model.layers.1.mlp.down_proj" in page
    assert (project / "out.report" / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert "http" not in page.replace("http://www.w3.org", "")
    run(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "whole", "--alpha", "inf")
    change(project, mode="plain")
    run(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "plain")
    for name, text in (("whole", "nothing to report"), ("plain", "nothing to report"), ("base", "no study")):
        code, _, err = run(monkeypatch, capsys, "report", name)
        assert code == 2, name
        assert text in err.lower(), err

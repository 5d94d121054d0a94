"""The command line as a user meets it: output, exit codes, one-paragraph errors, JSON."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml

from bmm_engine.cli import main
from bmm_engine.statistics.grams import GramSet
from tests.tiny import family
from tests.words import ENDLESS, WORDS, tokenizer_in


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A base, two experts with a tokenizer, calibration texts and a recipe, in the working directory."""
    family("bert", tmp_path)
    for name in ("base", "expert-0", "expert-1"):
        tokenizer_in(tmp_path / name, special=ENDLESS)
    for name in ("a", "b"):
        lines = [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 5]) for i in range(20)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    recipe = {
        "base": "base",
        "experts": [
            {"model": "expert-0", "calibration": "a.txt", "grams": "grams/a.safetensors"},
            {"model": "expert-1", "calibration": "b.txt"},
        ],
        "calibration": {"max_length": 16},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bmm(monkeypatch, capsys, *arguments):
    """Run `bmm ...`; returns (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["bmm", *map(str, arguments)])
    monkeypatch.delenv("BMM_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_merge_collects_writes_and_reuses(project, monkeypatch, capsys):
    from transformers import AutoModelForSequenceClassification

    code, out, err = bmm(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "merged")
    assert code == 0, err
    assert "13 modules solved" in out
    assert "Grams of 13 modules collected from a.txt: 20 samples" in err
    model = AutoModelForSequenceClassification.from_pretrained("merged")
    assert (project / "merged" / "tokenizer.json").exists()
    code, out, err = bmm(
        monkeypatch, capsys, "merge", "recipe.yaml", "-o", "merged", "--overwrite", "--alpha", "0.5", "--json"
    )
    assert code == 0, err
    assert err == ""
    assert json.loads(out)["solved_modules"] == 13
    record = json.loads((project / "merged" / "bmm_merge.json").read_text())
    assert record["recipe"]["alpha"] == 0.5
    again = AutoModelForSequenceClassification.from_pretrained("merged")
    weight = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(model.state_dict()[weight], again.state_dict()[weight])


def test_collect_a_checkpoint_and_a_recipe(project, monkeypatch, capsys):
    code, out, err = bmm(
        monkeypatch,
        capsys,
        "collect",
        "expert-0",
        "a.txt",
        "-o",
        "g.safetensors",
        "--modules",
        "*query",
        "--samples",
        7,
        "--json",
    )
    assert code == 0, err
    assert json.loads(out) == [
        {
            "file": "g.safetensors",
            "modules": 2,
            "grams": 2,
            "what": "2 Grams for 2 modules",
            "calibration": json.loads(out)[0]["calibration"],
        }
    ]
    assert "7 samples" in GramSet.load("g.safetensors").calibration
    code, _, err = bmm(monkeypatch, capsys, "collect", "recipe.yaml")
    assert code == 2
    assert "'" in err
    assert "expert-1" in err
    assert "give every expert a path" in err


def test_inspect(project, monkeypatch, capsys):
    code, out, err = bmm(monkeypatch, capsys, "inspect", "recipe.yaml", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["solved_modules"] == 13
    assert plan["from_base"] == []
    assert (plan["gram_source"], plan["grams_to_collect"]) == ("hybrid", True)
    code, out, _ = bmm(monkeypatch, capsys, "inspect", "recipe.yaml")
    assert code == 0
    assert "from the anchor (average): 28 tensors" in out
    assert "Grams are not collected yet" in out
    code, out, _ = bmm(monkeypatch, capsys, "inspect", "base", "--json")
    assert code == 0
    assert json.loads(out)["architecture"] == "BertForSequenceClassification"
    assert len(json.loads(out)["linear_modules"]) == 13
    assert "model.safetensors" in bmm(monkeypatch, capsys, "inspect", "base")[1]


def test_anchors(monkeypatch, capsys):
    code, out, _ = bmm(monkeypatch, capsys, "anchors", "--json")
    assert code == 0
    assert {row["name"] for row in json.loads(out)} >= {"average", "task_arithmetic", "ties", "iso_c"}
    assert "arXiv 2306.01708" in bmm(monkeypatch, capsys, "anchors")[1]


def test_errors_are_one_paragraph_and_exit_code_2(project, monkeypatch, capsys):
    (project / "recipe.yaml").write_text("base: base\nexperts: [expert-0]\naplha: 1\n")
    code, out, err = bmm(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "merged")
    assert code == 2
    assert out == ""
    assert err.startswith("error: recipe.yaml: unknown key 'aplha'; did you mean 'alpha'?")
    assert "Traceback" not in err
    assert not (project / "merged").exists()
    monkeypatch.setattr(sys, "argv", ["bmm", "--debug", "merge", "recipe.yaml", "-o", "merged"])
    with pytest.raises(Exception, match="aplha"):
        main()


def test_a_taken_output_is_refused_before_any_model_runs(project, monkeypatch, capsys):
    (project / "merged").mkdir()
    (project / "merged" / "mine.txt").write_text("keep")

    def never(*args, **kwargs):
        raise AssertionError("a model ran")

    monkeypatch.setattr("bmm_engine.pipeline.statistics.collect_from_checkpoint", never)
    code, _, err = bmm(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "merged")
    assert code == 2
    assert "merged" in err
    assert not (project / "grams").exists()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda r: r["experts"][0].update(calibration="none.txt"), "none.txt does not exist"),
        (lambda r: r["experts"][0].pop("calibration"), "does not exist, and no `calibration`"),
        (lambda r: r.update(base="nowhere/at/all"), "nowhere/at/all"),
        (lambda r: r["experts"][1].update(model="expert-9/"), "expert-9"),
        (lambda r: r.update(anchor={"name": "ties", "densty": 1}), "did you mean 'density'"),
    ],
)
def test_mistakes_in_a_recipe_cost_no_work(project, monkeypatch, capsys, edit, words):
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    edit(recipe)
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = sorted(p.name for p in project.iterdir())
    code, _, err = bmm(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "merged", "--offline")
    assert code == 2
    assert words in " ".join(err.split())
    assert sorted(p.name for p in project.iterdir()) == before


def test_usage_errors_exit_with_2_and_help_with_0(monkeypatch, capsys):
    assert bmm(monkeypatch, capsys, "merge")[0] == 2
    assert bmm(monkeypatch, capsys, "frobnicate")[0] == 2
    code, out, _ = bmm(monkeypatch, capsys, "--help")
    assert code == 0
    for command in ("merge", "collect", "inspect", "anchors", "demo"):
        assert command in out

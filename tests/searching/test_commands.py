"""The commands of the outer level as a user meets them, on classifiers with heads of their own."""

from __future__ import annotations

import json

import pytest
import yaml

from bmm_engine.cli import main
from tests.architectures import ARCHITECTURES
from tests.tiny import family, fine_tune
from tests.words import WORDS, tokenizer_in


@pytest.fixture
def project(tmp_path, monkeypatch):
    family("bert", tmp_path)
    for name in ("base", "expert-0", "expert-1"):
        tokenizer_in(tmp_path / name)
    experts = []
    for i in range(2):
        for part, first in (("val", 0), ("test", 30)):
            rows = [f"{(n + i) % 3}\t{' '.join(WORDS[n % 7 : n % 7 + 2 + n % 5])}" for n in range(first, first + 24)]
            (tmp_path / f"{part}-{i}.tsv").write_text("label\ttext\n" + "\n".join(rows) + "\n")
        (tmp_path / f"cal-{i}.txt").write_text("\n".join(" ".join(WORDS[n : n + 4]) for n in range(8)))
        experts.append({"name": f"task-{i}", "model": f"expert-{i}", "calibration": f"cal-{i}.txt",
                        "validation": f"val-{i}.tsv", "test": f"test-{i}.tsv"})  # fmt: skip
    recipe = {
        "base": "base",
        "experts": experts,
        "mode": "plain",
        "evaluation": {"kind": "text_classification"},
        "search": {"groups": "role"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, capsys, *arguments):
    """(exit code, standard output, standard error) of the command."""
    monkeypatch.setattr("sys.argv", ["bmm", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


def test_search_merge_report_and_sample(project, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "search", "recipe.yaml", "-o", "merged", "--trials", "5", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["trials"] == 5
    assert [row["name"] for row in found["rows"]] == ["experts", "anchor (average)", "default (average)", "best"]
    for row in found["rows"]:
        for split in ("validation", "test"):
            score = row[split]["scores"]["task-0"]
            assert score["samples"] == 24
            assert score["low"] <= score["value"] <= score["high"]
    recipe = yaml.safe_load((project / "merged.study" / "best.yaml").read_text())
    assert all(e["grams"].startswith(str(project)) for e in recipe["experts"])
    code, out, err = run(monkeypatch, capsys, "sample", "recipe.yaml", "-n", "2", "--split", "test", "--json")
    assert code == 0, err
    rows = json.loads(out)["evaluation"]["rows"]
    by_task = {row["task"]: row["value"] for row in rows if row["model"] == "MAP"}
    # The recipe's own merge scores what the trial of the plain default scored.
    default = next(row for row in found["rows"] if row["name"] == "default (average)")
    assert by_task == {task: score["value"] for task, score in default["test"]["scores"].items()}
    code, out, err = run(monkeypatch, capsys, "report", "merged", "--json")
    assert code == 0, err
    assert "task-0" in (project / "merged.study" / "report.html").read_text()
    # The same command again has nothing to do, and may replace its own merge; another recipe may not.
    code, _, err = run(monkeypatch, capsys, "search", "recipe.yaml", "-o", "merged", "--trials", "5", "--json")
    assert code == 0, err
    code, _, err = run(monkeypatch, capsys, "search", "recipe.yaml", "-o", "merged", "--trials", "5", "--seed", "3")
    assert code == 2
    assert "holds a study of another search" in err


def test_studies_of_data_and_trials(project, monkeypatch, capsys):
    common = ["recipe.yaml", "--anchors", "average", "--sources", "data,task_vectors", "--seeds", "2", "--json"]
    by_shares = ["study", "validation-fraction", *common, "-o", "shares", "--shares", "0.5,1", "--trials", "3"]
    code, out, err = run(monkeypatch, capsys, *by_shares)
    assert code == 0, err
    found = json.loads(out)
    assert len(found["points"]) == 2 * 2 * 2
    assert {(row["source"], row["x"]) for row in found["rows"]} == {
        (s, x) for s in ("data", "task_vectors") for x in (0.5, 1.0)
    }
    assert all(row["seeds"] == 2 for row in found["rows"])
    assert (project / "shares" / "study.png").read_bytes().startswith(b"\x89PNG")
    _, out, err = run(monkeypatch, capsys, *by_shares)
    assert json.loads(out)["points"] == found["points"]
    code, out, err = run(monkeypatch, capsys, "study", "trials", *common, "-o", "counts", "--counts", "2,5")
    assert code == 0, err
    points = json.loads(out)["points"]
    assert {p["x"] for p in points} == {2, 5}
    for seed in range(2):
        two, five = (next(p for p in points if (p["seed"], p["x"], p["source"]) == (seed, x, "data")) for x in (2, 5))
        assert five["validation"] >= two["validation"]


@pytest.mark.parametrize(
    ("name", "content"), [("results.json", '{"precious": 1}'), ("results.json", "no JSON"), ("study.png", "precious")]
)
def test_a_studys_files_replace_no_other_programs(project, monkeypatch, capsys, name, content):
    (project / "out").mkdir()
    (project / "out" / name).write_text(content)
    command = ["study", "trials", "recipe.yaml", "-o", "out", "--counts", "2", "--seeds", "1"]
    code, _, err = run(monkeypatch, capsys, *command)
    assert code == 2
    assert f"out: holds '{name}' of something else than a study by this engine" in " ".join(err.split())
    assert (project / "out" / name).read_text() == content
    assert [path.name for path in (project / "out").iterdir()] == [name]


def test_what_is_missing_is_said_before_anything_runs(project, monkeypatch, capsys):
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    cases = [
        ({"evaluation": None}, "the recipe has no `evaluation`"),
        ({"search": {"optimizer": "BOO"}}, "registers no 'BOO'; did you mean"),
        ({"search": {"objective": "men"}}, "did you mean 'mean'"),
        ({"search": {"trails": 3}}, "unknown key 'search.trails'; did you mean 'trials'?"),
        ({"search": {"alpha_range": [1, 0.1]}}, "two positive numbers, the smaller first"),
        (
            {"experts": [{k: v for k, v in e.items() if k != "validation"} for e in recipe["experts"]]},
            "has no `validation`",
        ),
        ({"experts": [{**e, "name": "same"} for e in recipe["experts"]]}, "two experts are called 'same'"),
        ({"evaluation": {"kind": "function"}}, "`function` (package.module:name) goes with kind 'function'"),
    ]
    for changes, message in cases:
        changed = {key: value for key, value in {**recipe, **changes}.items() if value is not None}
        (project / "bad.yaml").write_text(yaml.safe_dump(changed))
        code, _, err = run(monkeypatch, capsys, "search", "bad.yaml", "-o", "out")
        assert code == 2
        assert message in " ".join(err.split()), message
        assert not (project / "out.study").exists()
        assert not (project / "out").exists()


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "walked"])
@pytest.mark.parametrize("name", ["llama-tied", "llama", "mixtral"])
def test_language_models(name, calibrated, tmp_path, monkeypatch, capsys):
    """Embeddings tied or not; tensors that transformers fuses in the live model."""
    base = ARCHITECTURES[name].make()
    for folder, model in (("base", base), ("expert-0", fine_tune(base, 1)), ("expert-1", fine_tune(base, 2))):
        model.save_pretrained(tmp_path / folder)
        tokenizer_in(tmp_path / folder)
    experts = []
    for i in range(2):
        texts = "\n".join(" ".join(WORDS[(n + i) % 8 : (n + i) % 8 + 5]) for n in range(10))
        (tmp_path / f"texts-{i}.txt").write_text(texts)
        experts.append({"name": f"domain-{i}", "model": f"expert-{i}", "validation": f"texts-{i}.txt"})
        if calibrated:
            experts[-1]["calibration"] = f"texts-{i}.txt"
    recipe = {"base": "base", "experts": experts, "evaluation": {"kind": "language_model"}, "search": {"groups": "all"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, "search", "recipe.yaml", "-o", "merged", "--trials", "4", "--json")
    assert code == 0, err
    best = json.loads(out)["rows"][-1]["validation"]["scores"]["domain-0"]
    # The checkpoint on disk, read by transformers, gives the texts the likelihood that the trial had.
    from transformers import AutoModelForCausalLM

    from bmm_engine.evaluators.build import build_evaluator
    from bmm_engine.evaluators.contract import TaskData
    from bmm_engine.recipe.sections import EvaluationRecipe

    section = EvaluationRecipe(kind="language_model")
    evaluator = build_evaluator(section, [TaskData("t", tmp_path / "texts-0.txt", tmp_path / "merged")], "validation")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    score = evaluator(merged, "t")
    assert score.value == pytest.approx(best["value"], rel=1e-5)
    assert score.details["perplexity"] == pytest.approx(1 / score.value)
    assert evaluator(base, "t").value != pytest.approx(best["value"], rel=1e-5)


def test_code_of_a_recipe_runs_only_where_its_reader_allows_it(project, monkeypatch, capsys):
    monkeypatch.delenv("BMM_ALLOW_CODE", raising=False)
    monkeypatch.syspath_prepend(project)
    (project / "sent_judge.py").write_text(
        "from pathlib import Path\nPath('imported').touch()\n\ndef judge(model, task):\n    return 1.0\n\ndef least(values):\n"
        "    return min(values.values())\n"
    )
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    judged = {**recipe, "evaluation": {"kind": "function", "function": "sent_judge:judge"}}
    aimed = {**recipe, "search": {"objective": "sent_judge:least"}}
    for own, key in ((judged, "evaluation.function"), (aimed, "search.objective")):
        (project / "recipe.yaml").write_text(yaml.safe_dump(own))
        for command in (["search"], ["search", "--join"], ["study", "validation-fraction"], ["study", "trials"]):
            code, _, err = run(monkeypatch, capsys, *command, "recipe.yaml", "-o", "merged")
            assert code == 2
            assert f"{key} = 'sent_judge:" in err
            assert "--allow-code" in err
            assert "BMM_ALLOW_CODE=sent_judge" in err
    assert sorted(p.name for p in project.glob("merged*")) == []
    assert not (project / "imported").exists()
    (project / "recipe.yaml").write_text(yaml.safe_dump(judged))
    code, out, err = run(
        monkeypatch, capsys, "search", "recipe.yaml", "-o", "merged", "--trials", "2", "--no-merge", "--allow-code",
        "--objective", "sent_judge:least", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert (project / "imported").exists()
    assert json.loads(out)["best"]["value"] == 1.0
    # What comes out of the search names the same code, and merging it runs none.
    (project / "imported").unlink()
    code, _, err = run(monkeypatch, capsys, "inspect", "merged.study/best.yaml")
    assert code == 0, err
    assert not (project / "imported").exists()

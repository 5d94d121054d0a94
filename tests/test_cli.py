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
    monkeypatch.setenv("BMM_DEBUG", "")  # so that what --debug sets ends with this test
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


NAMES = ("[bold]x[/]", "[/red]", ":smile:")


@pytest.fixture
def bracketed(project):
    """The project's recipe in a folder, and with experts, whose names are markup."""
    folder = project / "[bold]in[/bold]"
    folder.mkdir(parents=True)
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    for expert, name, letter in zip(recipe["experts"], NAMES, "ab", strict=False):
        model = (project / expert["model"]).rename(project / f"[red]{expert['model']}")
        expert |= {"name": name, "model": str(model), "grams": f"[i]{letter}[/i].safetensors"}
        expert["calibration"] = str(project / expert["calibration"])
    (folder / "[red]r.yaml").write_text(yaml.safe_dump({**recipe, "base": str(project / "base")}))
    return folder / "[red]r.yaml"


def test_names_and_paths_with_brackets_are_printed_as_they_are(bracketed, monkeypatch, capsys):
    out = bracketed.parent / "out[/red]"
    code, said, err = bmm(monkeypatch, capsys, "merge", bracketed, "-o", out)
    assert code == 0, err
    assert f"{out}: 13 modules solved" in said
    assert all(f"{name}: Grams of 13 modules collected" in err for name in NAMES[:2])
    code, said, err = bmm(monkeypatch, capsys, "inspect", bracketed)
    assert code == 0, err
    assert all(f"[red]{name}" in said for name in ("expert-0", "expert-1"))
    code, said, err = bmm(monkeypatch, capsys, "inspect", out)
    assert code == 0, err
    assert "out[/red]" in said
    code, said, err = bmm(monkeypatch, capsys, "collect", bracketed)
    assert code == 0, err
    assert "[i]a[/i].safetensors: " in said
    for argument in NAMES:
        code, _, err = bmm(monkeypatch, capsys, "merge", f"{argument}.yaml", "-o", "m")
        assert code == 2
        assert err.startswith(f"error: {argument}.yaml: ")
    bracketed.write_text(bracketed.read_text() + "'[/red]': 1\n")
    assert "[red]r.yaml: unknown key '[/red]'" in bmm(monkeypatch, capsys, "inspect", bracketed)[2]


def test_tables_and_progress_show_brackets_as_they_are(monkeypatch, capsys):
    from bmm_engine.commands.common import make_console
    from bmm_engine.commands.search import _table
    from bmm_engine.progress import track
    from bmm_engine.recipe.sections import SearchRecipe
    from bmm_engine.searching.view import Lines, LiveView

    score = {"value": 0.5, "samples": 0, "low": 0.0, "high": 1.0}
    rows = [{"name": name, "validation": {"objective": 1.0, "scores": dict.fromkeys(NAMES, score)}} for name in NAMES]
    console = make_console(min_width=200)
    console.print(_table(rows))
    printed = capsys.readouterr().out
    assert [printed.count(name) for name in NAMES] == [2, 2, 2]
    console.print(LiveView(console, SearchRecipe()).render())
    Lines(lambda line: console.print(line)).report("[/red] :smile:")
    assert "[/red] :smile:" in capsys.readouterr().out
    for name in NAMES:
        assert list(track([1], name, show=True)) == [1]  # markup that closes nothing would be an error


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "mps", "bogus", "", "meta", "cuda:-1", "cpu:7", "cuda:0x1"])
@pytest.mark.parametrize("command", ["merge", "collect"])
def test_a_device_that_is_not_there_is_refused_before_any_work(project, monkeypatch, capsys, device, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["recipe.yaml"] if command == "merge" else ["expert-0", "a.txt"]
    code, _, err = bmm(monkeypatch, capsys, command, *arguments, "-o", "out.safetensors", f"--device={device}")
    assert code == 2
    assert f"device = '{device}': " in err
    assert "cpu" in err
    assert not list(project.glob("out*"))
    assert not (project / "grams").exists()


def test_the_device_of_the_command_is_used_instead_of_the_recipes(project, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    recipe["experts"][1]["grams"] = "grams/b.safetensors"
    (project / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "device": "cuda"}))
    code, _, err = bmm(monkeypatch, capsys, "collect", "recipe.yaml")
    assert code == 2
    assert "device = 'cuda': this machine has no CUDA device" in err
    code, _, err = bmm(monkeypatch, capsys, "collect", "recipe.yaml", "--device", "cpu")
    assert code == 0, err
    assert (project / "grams" / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe.yaml", "--samples", "3"], r"recipe.yaml: --samples has no effect here: a recipe says"),
        (["recipe.yaml", "--dtype", "float32"], r"recipe.yaml: --dtype has no effect"),
        (["recipe.yaml", "a.txt"], r"recipe.yaml: DATA has no effect"),
        (["recipe.yaml", "-o", "x.safetensors"], r"recipe.yaml: --output has no effect"),
        (["recipe.yaml", "--modules", "*query*"], r"recipe.yaml: --modules has no effect"),
        (
            ["expert-0", "a.txt", "-o", "x.safetensors", "--workers", "2"],
            r"expert-0: --workers has no effect here: it is",
        ),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(project, monkeypatch, capsys, arguments, words):
    code, _, err = bmm(monkeypatch, capsys, "collect", *arguments)
    assert code == 2
    assert words in err
    assert not (project / "grams").exists()
    assert not (project / "x.safetensors").exists()


def test_a_recipes_device_is_checked_where_work_starts(project, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    recipe = (project / "recipe.yaml").read_text()
    (project / "recipe.yaml").write_text(recipe + "device: cuda:2\n")
    assert bmm(monkeypatch, capsys, "inspect", "recipe.yaml")[0] == 0
    code, _, err = bmm(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "merged")
    assert code == 2
    assert "recipe.yaml: device = 'cuda:2': this machine has cuda:0 to cuda:1" in err
    (project / "recipe.yaml").write_text(recipe + "device: gpu\n")
    assert "recipe.yaml: device = 'gpu': it must be cpu, cuda or cuda:N" in bmm(
        monkeypatch, capsys, "inspect", "recipe.yaml"
    )[2]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"), [("o" * 230, "is too long"), ("o\udcff", "is not UTF-8"), ("o/" * 2100, "is too long")]
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(project, monkeypatch, capsys, name, words):
    for arguments in (["merge", "recipe.yaml"], ["collect", "expert-0", "a.txt"]):
        code, _, err = bmm(monkeypatch, capsys, *arguments, "-o", name)
        assert code == 2
        assert words in err
        assert len(err) < 1600
    assert not (project / "grams").exists()


def test_a_model_whose_grams_cannot_be_kept_is_named(project, monkeypatch, capsys):
    """Squares that overflow, and inputs that are all zero."""
    from safetensors.torch import load_file, save_file

    file = project / "expert-0" / "model.safetensors"
    tensors = load_file(file)
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    for value, words in ((1e30, "NaN or infin"), (0.0, "is all zero")):
        bias = name.replace("weight", "bias")
        save_file(
            {**tensors, name: tensors[name] * 0 + value, bias: tensors[bias] * 0}, file, metadata={"format": "pt"}
        )
        code, _, err = bmm(monkeypatch, capsys, "collect", "expert-0", "a.txt", "-o", "x.safetensors")
        assert code == 2
        assert "expert-0 on " in err
        assert words in err
        assert not (project / "x.safetensors").exists()


def test_what_standard_output_cannot_encode_is_no_failure(project, monkeypatch, capsys):
    import os

    folder = os.fsdecode(os.fsencode(str(project / "base")) + b"\xff")
    os.rename(project / "base", folder)
    code, out, err = bmm(monkeypatch, capsys, "inspect", folder)
    assert code in (0, 2), err
    assert "\\udcff" in out + err

"""A recipe writes what it measures only where its user said."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bmm_engine.cli import main
from bmm_engine.errors import ConfigError, OutputExistsError
from bmm_engine.pipeline import measure, statistics
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.statistics.records import check_replaceable, write_record
from tests.tiny import family, make_batches


@pytest.fixture
def project(tmp_path, monkeypatch):
    """tmp_path/here has the recipe, tmp_path/work is the working folder."""
    folder = tmp_path / "here"
    family("bert", folder)
    batches = make_batches("bert", 10)
    save_file({k: torch.cat([b[k] for b in batches]) for k in batches[0]}, folder / "data.safetensors")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def write(folder, key, value, **more):
    experts = [{"model": f"expert-{t}", "calibration": "data.safetensors", key: value.format(t)} for t in range(2)]
    raw = {"base": "base", "experts": experts, "calibration": {"batch_size": 4}, "output_weights": "none", **more}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bmm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    _, err = capsys.readouterr()
    return stopped.value.code or 0, " ".join(err.split())


KINDS = {
    "grams": {"mode": "plain"},
    "fisher": {"mode": "plain", "anchor": "fisher", "alpha": float("inf")},
    "sensitivity": {"mode": "sequential", "output_weights": "sensitivity"},
}


@pytest.mark.parametrize("key", KINDS)
@pytest.mark.parametrize("place", ["../{}.safetensors", "/{}", "link/{}.safetensors", "sub/../../{}", "dangling-{}"])
def test_a_place_outside_is_refused_before_any_model_runs(project, monkeypatch, key, place):
    outside = project.parent / "outside"
    outside.mkdir()
    (project / "link").symlink_to(outside)
    for t in range(2):
        (project / f"dangling-{t}").symlink_to(outside / str(t))
    write(project, key, str(outside) + place if place == "/{}" else place, **KINDS[key])
    monkeypatch.setattr(measure, "live_model", None)
    monkeypatch.setattr(statistics, "live_model", None)
    message = rf"expert 'expert-0': its `{key}` file would be written to .*neither in the recipe's folder.*--write-to"
    with pytest.raises(ConfigError, match=message):
        run_recipe(Recipe.load(project / "recipe.yaml"), project / "out")
    assert list(outside.iterdir()) == []
    assert not (project / "out").exists()


@pytest.mark.parametrize("command", ["merge", "collect"])
def test_the_command_line_names_a_folder(project, capsys, monkeypatch, command):
    write(project, "grams", "../grams/{}.safetensors", mode="plain")
    more = ["-o", project / "out"] if command == "merge" else []
    code, err = run(capsys, monkeypatch, command, project / "recipe.yaml", *more)
    assert code == 2
    assert f"--write-to {project.parent / 'grams'}" in err
    assert not (project.parent / "grams").exists()
    code, err = run(capsys, monkeypatch, command, project / "recipe.yaml", *more, "--write-to", "../grams")
    assert code == 0, err
    assert len(list((project.parent / "grams").iterdir())) == 2
    # What is there is read without being named.
    if command == "merge":
        code, err = run(capsys, monkeypatch, command, project / "recipe.yaml", "-o", project / "again")
        assert code == 0, err


@pytest.mark.parametrize("place", ["{}.safetensors", "../work/{}.safetensors", "new/folder/{}.safetensors"])
def test_the_recipes_and_the_working_folder_are_open(project, place):
    write(project, "grams", place, mode="plain")
    run_recipe(Recipe.load(project / "recipe.yaml"), project / "out")
    assert (project / place.format(1)).exists()


def test_a_recipe_from_python_writes_into_the_working_folder_and_where_it_is_told(project):
    write(project, "grams", str(project / "{}.safetensors"))
    raw = yaml.safe_load((project / "recipe.yaml").read_text())
    here = Recipe.parse(raw)
    with pytest.raises(ConfigError, match="would be written to"):
        here.check_writable("grams")
    told = Recipe.parse(raw, write_to=[project])
    for recipe in (told, told.model_copy(update={"alpha": 1.0}), pickle.loads(pickle.dumps(told))):
        recipe.check_writable("grams")
    assert here == told


def test_a_measured_file_replaces_only_its_like(tmp_path):
    path = tmp_path / "g.safetensors"
    ours = {"a": torch.ones(2)}
    write_record(path, ours, "bmm-grams", {}, "Grams")
    write_record(path, ours, "bmm-grams", {"more": 1}, "Grams")
    model, text, link, folder = (tmp_path / name for name in ("model.safetensors", "text", "link", "folder"))
    save_file(ours, model)
    text.write_text("precious")
    link.symlink_to(path)
    folder.mkdir()
    for taken in (model, text, link, folder):
        with pytest.raises(OutputExistsError, match=rf"{taken.name}: exists and is no Grams file"):
            write_record(taken, ours, "bmm-grams", {}, "Grams")
    with pytest.raises(OutputExistsError, match="exists and is no fisher file"):
        check_replaceable(path, "bmm-fisher", "fisher")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "folder",
        "g.safetensors",
        "link",
        "model.safetensors",
        "text",
    ]


def test_collecting_over_somebody_elses_file_is_refused_before_the_model_runs(project, capsys, monkeypatch):
    before = (project / "data.safetensors").read_bytes()
    code, err = run(
        capsys,
        monkeypatch,
        "collect",
        project / "expert-0",
        project / "data.safetensors",
        "-o",
        project / "data.safetensors",
    )
    assert code == 2
    assert "exists and is no grams file" in err
    assert (project / "data.safetensors").read_bytes() == before

"""The table of merge quality on two tasks of a few sentences: every kind of row, kept rows, bad data."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

import bmm_engine as bmm
from bench import __main__ as bench
from bench.accuracy import command, methods, results, text8, theory, vision4
from bench.accuracy.experiment import Scorer, load_tensors
from bench.accuracy.methods import Merger
from bmm_engine.demo.data import Sizes
from bmm_engine.errors import DataError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Which of two words does the sentence contain? And which of three?"""
    rng = random.Random(0)
    for name, classes in (("sst2", 2), ("tweet_emotion", 3)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / "labels.json").write_text(json.dumps([f"class {i}" for i in range(classes)]))
        for part, size in (("train", 48), ("val", 24), ("test", 24)):
            rows = []
            for number in range(size):
                label = number % classes
                words = [f"word{label}", *(f"word{w}" for w in rng.choices(range(10, 40), k=rng.randint(1, 8)))]
                rows.append(f"{label}\t{' '.join(words)}")
            (folder / f"{part}.tsv").write_text("label\ttext\n" + "\n".join(rows) + "\n")
    return tmp_path / "data"


@pytest.fixture
def arguments(data: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(text8, "base_package_dir", lambda: tiny_base)
    monkeypatch.setattr(command, "commit", lambda: "abc")  # of a clean working tree
    given = ["accuracy", "--suite", "text8", "--data", str(data), "--cache", str(tmp_path / "cache"), "--seeds", "1"]
    return [*given, "--tasks", "sst2", "tweet_emotion", "--size", "48", "12", "24", "24", "--trials", "2"]


def test_every_kind_of_row_is_scored_and_kept(arguments, tmp_path, capsys, monkeypatch):
    rows = ["experts", "base", "average", "anchor fisher", "anchor regmean"]
    files = [
        "--json",
        str(tmp_path / "rows.json"),
        "--markdown",
        str(tmp_path / "t.md"),
        "--plot",
        str(tmp_path / "p.png"),
    ]
    assert bench.main([*arguments, "--rows", *rows, *files, "--validation"]) == 0
    found = {result.row: result for result in results.read(tmp_path / "rows.json")}
    kinds = {method for method, _ in found}
    assert kinds >= {
        "experts",
        "base",
        "anchor",
        "anchor, scale searched",
        "data-free",
        "data",
        "hybrid",
        "data, weighted outputs",
        "hybrid, weighted outputs",
        "sequential",
        "sequential, weighted outputs",
        "data-free, searched",
        "data, searched",
        "sequential, searched",
    }
    assert ("anchor", "regmean_plusplus") in found
    experts = found["experts", ""]
    assert experts.normalised == experts.worst == experts.validation == 1
    average = found["anchor", "average"]
    assert average.mean == pytest.approx(sum(average.scores.values()) / 2)
    shares = {task: average.scores[task] / experts.scores[task] for task in experts.scores}
    assert average.normalised == pytest.approx(sum(shares.values()) / 2)
    assert average.worst == pytest.approx(min(shares.values()))
    assert found["anchor, scale searched", "average"].chosen["scale"] in methods.SCALES
    assert len({result.scores["sst2"] for result in found.values()}) > 1
    table = (tmp_path / "t.md").read_text()
    assert all(f"| {method} |" in table for method in kinds)
    assert (tmp_path / "p.png").stat().st_size > 1000

    # Rows of the same commit are not done again; others are kept.
    monkeypatch.setattr(Merger, "anchor", lambda self, rule: pytest.fail("merged again"))
    capsys.readouterr()
    assert bench.main([*arguments, "--rows", "anchor average", *files[:2]]) == 0
    assert {result.row for result in results.read(tmp_path / "rows.json")} == set(found)


def test_equal_merges_are_scored_once(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "SCALES", (1.0,))
    scored, score = [], Scorer.__call__
    monkeypatch.setattr(Scorer, "__call__", lambda self, model: scored.append(self) or score(self, model))
    rows = ["--rows", "anchor average", "anchor, scale searched average"]
    assert bench.main([*arguments, *rows, "--json", str(tmp_path / "rows.json")]) == 0
    anchor, scaled = results.read(tmp_path / "rows.json")
    assert scaled.chosen == {"scale": 1.0}
    assert scaled.scores == anchor.scores
    assert len(scored) == 2  # one of them on the rows that a search scores by


def test_what_the_theory_claims_is_measured(arguments, tmp_path, monkeypatch):
    options = dict(zip(arguments[1::2], arguments[2::2]))
    monkeypatch.setattr(theory, "SAMPLES", (4, 8))
    monkeypatch.setattr(theory, "RIDGES", (1e-2, 1.0))
    monkeypatch.setattr(theory, "PRIORS", ("average", "tsv_m"))
    monkeypatch.setattr(theory, "SHARES", (0.0, 1.0))
    monkeypatch.setattr(theory, "DRAWS", 2)
    small = partial(text8.prepare, names=("sst2", "tweet_emotion"), sizes=Sizes(48, 12, 24, 24))
    monkeypatch.setattr(text8, "prepare", small)
    merged, merge = [], bmm.merge
    monkeypatch.setattr(bmm, "merge", lambda *models, **options: merged.append(options) or merge(*models, **options))
    files = ["--json", str(tmp_path / "theory.json"), "--plot", str(tmp_path / "theory.png")]
    given = [key for name in ("--suite", "--data", "--cache") for key in (name, options[name])]
    monkeypatch.setattr("sys.argv", ["theory", *given, *files])
    theory.main()
    found = json.loads((tmp_path / "theory.json").read_text())
    assert all(0 <= row["cosine"] <= 1 for row in found["alignment"])
    assert {row["task"] for row in found["alignment"]} == {"sst2", "tweet_emotion"}
    assert [row["samples"] for row in found["samples"]] == [0, 0, *[4] * 7, *[8] * 7]
    shares = {(row["anchor"], row["method"], row["share"]) for row in found["shares"]}
    assert len(shares) == len(found["shares"]) == 8
    # Scores of 24 sentences may be equal at different shares, so what was merged is looked at instead.
    asked = [
        (own["anchor"], len(own["sensitivities"]), own["hybrid"])
        for own in merged
        if "hybrid" in own and "anchor" in own
    ]
    assert asked == [
        (anchor, weights, share) for anchor in ("average", "tsv_m") for weights in (0, 2) for share in (0, 1)
    ]
    ridge = {(row["anchor"], row["alpha"]): row["value"] for row in found["ridge"]}
    assert len(ridge) == 9
    assert {row["tasks"] for row in found["tasks"]} == {2}
    assert len(found["tasks"]) == 7
    assert {row["method"] for row in found["calibration"]} == {"MAP", "posterior average"}
    assert (tmp_path / "theory.png").stat().st_size > 1000


def test_seeds_differ_in_training_rows_and_not_in_what_is_scored(data):
    first, second = (text8.load(data, names=["sst2"], seed=seed, sizes=Sizes(20, 5, 10, 10))[0] for seed in (0, 1))
    assert first.test == second.test
    assert set(first.train.texts) != set(second.train.texts)
    assert set(first.calibration) <= set(first.train.texts)


def test_missing_and_damaged_data_say_what_to_do(data):
    (data / "sst2" / "val.tsv").write_text("label\ttext\n7\tword0\n")
    with pytest.raises(DataError, match=r"val.tsv: line 2 is not a class below 2"):
        text8.load(data, names=["sst2"], seed=0)
    (data / "sst2" / "val.tsv").unlink()
    with pytest.raises(DataError, match=r"val.tsv cannot be read.*stanfordnlp/sst2 on Hugging Face"):
        text8.load(data, names=["sst2"], seed=0)
    with pytest.raises(DataError, match=r"data.npz cannot be read.*ylecun/mnist"):
        vision4.load(data / "mnist" / "data.npz", "mnist", 0, Sizes())


def test_images_are_framed_and_calibration_is_nested(tmp_path):
    rng = np.random.default_rng(0)
    parts = {f"x_{part}": rng.integers(0, 256, (12, 28, 28), dtype=np.uint8) for part in ("train", "val", "test")}
    parts |= {f"y_{part}": np.arange(12, dtype=np.uint8) % 3 for part in ("train", "val", "test")}
    np.savez(tmp_path / "data.npz", names=np.array(["a", "b", "c"]), **parts)
    task = vision4.load(tmp_path / "data.npz", "mnist", 0, Sizes(12, 4, 12, 12))
    images, labels = task.train
    assert images.shape == (12, 3, 32, 32)
    assert images.min() >= -1
    assert images.max() <= 1
    assert (images[:, :, :2] == -1).all()
    assert sorted(labels.tolist()) == sorted(parts["y_train"].tolist())
    few, more = (vision4._calibration(task, count, 0)[0]["pixel_values"] for count in (4, 8))
    assert (more[:4] == few).all()


def test_a_merge_loads_by_live_names_and_by_those_of_the_files(tmp_path):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**{**vision4.SHAPE, "num_hidden_layers": 1}), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    own, in_files = model.state_dict(), load_file(tmp_path / "model.safetensors")
    assert own.keys() != in_files.keys()  # else this proves nothing
    for given in (own, in_files):
        empty = ViTModel(model.config, add_pooling_layer=False)
        load_tensors(empty, {name: tensor + 1 for name, tensor in given.items()})
        assert all(torch.equal(tensor, own[name] + 1) for name, tensor in empty.state_dict().items())

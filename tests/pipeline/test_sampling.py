"""Draws as checkpoints, and their average beside the MAP, against models that transformers loads and runs."""

from __future__ import annotations

import json
import math

import pytest
import torch
import typer
import yaml
from torch import nn
from typer.testing import CliRunner

from bmm_engine.commands.sample import sample
from bmm_engine.errors import ConfigError, OutputExistsError
from bmm_engine.evaluators.scores import classification_score
from bmm_engine.pipeline.live import LiveModels
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.pipeline.sampling import compare, draw, evaluate_samples
from bmm_engine.recipe.recipe import Recipe
from tests.tiny import family, save
from tests.words import ENDLESS, WORDS, tokenizer_in


def alike(recipe):
    """The merge that has a posterior."""
    return recipe.model_copy(update={"output_weights": "none"})


@pytest.fixture
def recipe(tmp_path):
    """A bare encoder as the base, two classifiers as experts, a tokenizer, calibration and labelled texts of two splits."""
    base, _, _, _ = family("bert", tmp_path)
    save(base.bert, tmp_path / "encoder")
    experts = []
    for t in range(2):
        tokenizer_in(tmp_path / f"expert-{t}", special=ENDLESS)
        (tmp_path / f"calibration-{t}.txt").write_text("\n".join(texts(t)))
        own = {"model": f"expert-{t}", "calibration": f"calibration-{t}.txt"}
        for split, offset in (("validation", 2), ("test", 5)):
            lines = [f"{i * (t + 1) % 3}\t{text}" for i, text in enumerate(texts(t + offset))]
            (tmp_path / f"{split}-{t}.tsv").write_text("\n".join(["label\ttext", *lines]))
            own[split] = f"{split}-{t}.tsv"
        experts.append(own)
    raw = {
        "base": "encoder",
        "experts": experts,
        "mode": "plain",
        "alpha": 0.1,
        "calibration": {"max_length": 16},
        "evaluation": {"kind": "text_classification", "batch_size": 5},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return Recipe.load(tmp_path / "recipe.yaml")


def texts(seed):
    return [" ".join(WORDS[(seed + 3 * i + j * (1 + i % 4)) % 14] for j in range(3 + i % 5)) for i in range(24)]


def weights(path):
    from transformers import BertModel

    return BertModel.from_pretrained(path).state_dict()


def test_draws_are_checkpoints_of_one_measurement(recipe, tmp_path):
    lines = []
    paths = draw(recipe, 3, output=tmp_path / "out", seed=4, temperature=0.3, report=lines.append)
    assert paths == [tmp_path / "out" / f"sample-{i}" for i in range(3)]
    assert len([line for line in lines if "collected" in line]) == 2
    mode = weights(run_recipe(alike(recipe), tmp_path / "map").path)
    found = [weights(path) for path in paths]
    name = "encoder.layer.1.output.dense.weight"
    states = [mode, *found]
    assert not any(torch.allclose(a[name], b[name]) for i, a in enumerate(states) for b in states[:i])
    # What comes from the anchor is the same in all.
    kept = "encoder.layer.1.output.LayerNorm.weight"
    assert all(torch.equal(mode[kept], state[kept]) for state in found)
    for i, path in enumerate(paths):
        record = json.loads((path / "bmm_merge.json").read_text())["modules"]
        assert record["posterior"] == {"seed": 4, "index": i, "temperature": 0.3}
        assert all(m["tau"] > 0 for m in record["modules"])
    # A series goes on where it was stopped, and is the same then.
    again = draw(recipe, 1, output=tmp_path / "more", seed=4, temperature=0.3, first=2)
    assert again == [tmp_path / "more" / "sample-2"]
    assert all(torch.equal(tensor, found[2][n]) for n, tensor in weights(again[0]).items())


def test_draws_refuse_before_any_model_runs(recipe, tmp_path, monkeypatch):
    draw(recipe, 1, output=tmp_path / "out", first=1)
    before = (tmp_path / "out" / "sample-1" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patched:

        def never(*_, **__):
            raise AssertionError("a model was measured")

        patched.setattr("bmm_engine.pipeline.sampling.prepare_recipe", never)
        with pytest.raises(OutputExistsError, match=r"sample-1: holds an earlier merge"):
            draw(recipe, 3, output=tmp_path / "out")
        with pytest.raises(OutputExistsError, match=r"sample-1: is itself a merged checkpoint"):
            draw(recipe, 3, output=tmp_path / "out" / "sample-1")
        with pytest.raises(ConfigError, match=r"alpha is inf.*give a finite alpha"):
            draw(recipe.model_copy(update={"alpha": math.inf}), 2, output=tmp_path / "no")
        with pytest.raises(ConfigError, match="at least 1, not 0"):
            draw(recipe, 0, output=tmp_path / "no")
        with pytest.raises(ConfigError, match="temperature must be finite"):
            draw(recipe, 1, output=tmp_path / "no", temperature=-1.0)
        with pytest.raises(ConfigError, match="split must be 'validation' or 'test', not 'train'"):
            evaluate_samples(recipe, 2, split="train")
        with pytest.raises(ConfigError, match="the recipe has no `evaluation`"):
            evaluate_samples(recipe.model_copy(update={"evaluation": None}), 2)
        other = recipe.evaluation.model_copy(update={"kind": "language_model"})
        with pytest.raises(ConfigError, match=r"kind 'language_model' does not have"):
            evaluate_samples(recipe.model_copy(update={"evaluation": other}), 2)
        first, second = recipe.experts
        lacking = [first, second.model_copy(update={"test": None})]
        with pytest.raises(ConfigError, match="expert 'expert-1' has no `test` file"):
            evaluate_samples(recipe.model_copy(update={"experts": lacking}), 2, split="test")
        same = [first.model_copy(update={"name": "a"}), second.model_copy(update={"name": "a"})]
        with pytest.raises(ConfigError, match=r"not all different \(a, a\)"):
            evaluate_samples(recipe.model_copy(update={"experts": same}), 2)
    assert not (tmp_path / "no").exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["sample-1"]
    draw(recipe, 1, output=tmp_path / "out", first=1, seed=9, overwrite=True)
    assert (tmp_path / "out" / "sample-1" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_average_is_that_of_the_written_draws(recipe, tmp_path, split):
    from transformers import AutoTokenizer, BertForSequenceClassification

    found = evaluate_samples(recipe, 3, seed=1, temperature=1.0, split=split)
    assert (found.split, found.count) == (split, 3)
    paths = [
        run_recipe(alike(recipe), tmp_path / "map").path,
        *draw(recipe, 3, output=tmp_path, seed=1, temperature=1.0),
    ]
    encoders = [weights(path) for path in paths]
    for t, own in enumerate(found.tasks):
        model = BertForSequenceClassification.from_pretrained(tmp_path / f"expert-{t}").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"expert-{t}")
        rows = [line.split("\t") for line in (tmp_path / f"{split}-{t}.tsv").read_text().splitlines()[1:]]
        labels = torch.tensor([int(label) for label, _ in rows])
        batch = tokenizer([text for _, text in rows], padding=True, return_tensors="pt")
        probabilities = []
        for state in encoders:
            model.bert.load_state_dict(state)
            with torch.inference_mode():
                probabilities.append(model(**batch).logits.softmax(1))
        assert own.task == f"expert-{t}"
        for score, truth in ((own.map, probabilities[0]), (own.average, torch.stack(probabilities[1:]).mean(0))):
            expected = classification_score(truth, labels, "accuracy", "")
            assert (score.value, score.samples, score.low, score.high) == (
                expected.value,
                24,
                expected.low,
                expected.high,
            )
            assert score.details["nll"] == pytest.approx(expected.details["nll"], rel=1e-5)
            key = "expected_calibration_error"
            assert score.details[key] == pytest.approx(expected.details[key], abs=1e-5)
        assert own.map.details["nll"] != pytest.approx(own.average.details["nll"], rel=1e-4)


class Halves:
    """Two samples of each of two classes that look the same: whoever is sure of either is wrong half of the time."""

    tasks = ("toy",)

    def probabilities(self, model, task):
        with torch.inference_mode():
            return model(torch.ones(4, 1)).softmax(1)

    def score(self, probabilities, task):
        return classification_score(probabilities, torch.tensor([0, 0, 1, 1]), "accuracy", task)


def test_an_average_of_draws_that_disagree_is_calibrated():
    model = nn.Linear(1, 2, bias=False)
    live = LiveModels({"toy": model}, {"w": model.weight})
    sure = torch.tensor([[20.0], [-20.0]])
    [found] = compare(Halves(), live, {"w": sure}, [{"w": sure}, {"w": -sure}])
    assert found.map.details["expected_calibration_error"] == pytest.approx(0.5, abs=1e-6)
    assert found.map.details["nll"] == pytest.approx(20.0, abs=1e-4)
    assert found.average.details["expected_calibration_error"] == pytest.approx(0.0, abs=1e-6)
    assert found.average.details["nll"] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ConfigError, match="no draws to average"):
        compare(Halves(), live, {"w": sure}, [])


def test_the_command(recipe, tmp_path):
    app = typer.Typer()
    app.command()(sample)

    def run(*arguments):
        done = CliRunner().invoke(app, [str(tmp_path / "recipe.yaml"), *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    judged = json.loads(run("-n", 2, "--seed", 3, "--temperature", 0.5, "--json"))
    assert judged["samples"] == []
    assert judged["evaluation"] == evaluate_samples(recipe, 2, seed=3, temperature=0.5).plain()
    assert judged["evaluation"]["split"] == "test"
    assert [(row["task"], row["model"]) for row in judged["evaluation"]["rows"]] == [
        (task, model) for task in ("expert-0", "expert-1") for model in ("MAP", "average")
    ]
    written = json.loads(run("-n", 2, "-o", tmp_path / "out", "--json"))
    assert written == {"samples": [str(tmp_path / "out" / f"sample-{i}") for i in range(2)], "evaluation": None}
    text = run("-n", 2, "-o", tmp_path / "out", "--overwrite", "--split", "validation")
    assert "2 draws at temperature 0.0625, validation set" in text
    assert "sample-0 to sample-1" in text
    rows = evaluate_samples(recipe, 2, split="validation").rows()
    mean = sum(row["nll"] for row in rows if row["model"] == "average") / 2
    assert f"{mean:.4f}" in text

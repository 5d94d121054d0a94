"""What scores silently wrong, or fails without a reason, unless it is looked after."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from bmm_engine.errors import CheckpointError, ConfigError, DataError
from bmm_engine.evaluators.build import build_evaluator
from bmm_engine.evaluators.contract import TaskData
from bmm_engine.evaluators.function import FunctionEvaluator
from bmm_engine.evaluators.heads import with_head
from bmm_engine.evaluators.scores import Score, classification_score, likelihood_score
from bmm_engine.recipe.sections import EvaluationRecipe
from tests.tiny import make_base, save
from tests.words import tokenizer_in

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "it", "rained"]
TEXTS = [" ".join(WORDS[i % 3 : i % 3 + 1 + (5 * i) % 6]) for i in range(12)]


def checkpoint(architecture: str, folder: Path, padding_side: str = "right") -> tuple[nn.Module, Path]:
    """A live model, and its folder with a tokenizer that pads on that side."""
    model = make_base(architecture)
    save(model, folder)
    tokenizer_in(folder, WORDS, padding_side=padding_side)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "padding_side": padding_side}))
    return model, folder


def evaluator(task: TaskData, kind: str = "text_classification", **changes: object):
    return build_evaluator(EvaluationRecipe(kind=kind, **{"batch_size": 5, **changes}), [task], "validation")


def table(path: Path, labels: list[object]) -> Path:
    path.write_text("label\ttext\n" + "".join(f"{y}\t{t}\n" for y, t in zip(labels, TEXTS)))
    return path


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_tokenizer_that_pads_on_the_left_changes_no_likelihood(tmp_path, architecture):
    model, folder = checkpoint(architecture, tmp_path / "m", "left")
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    task = TaskData("t", tmp_path / "t.txt", folder)
    alone, together = (evaluator(task, "language_model", batch_size=size)(model, "t") for size in (1, 5))
    assert together.details["loss"] == pytest.approx(alone.details["loss"], rel=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_tokenizer_that_pads_on_the_left_changes_no_class(tmp_path, pooling):
    model, folder = checkpoint("bert", tmp_path / "m", "left")
    save_file({"weight": torch.randn(3, 16), "bias": torch.zeros(3)}, tmp_path / "head.safetensors")
    live = with_head(model.bert, tmp_path / "head.safetensors", pooling)
    task = TaskData("t", table(tmp_path / "d.tsv", [i % 3 for i in range(12)]), folder)
    alone, together = (evaluator(task, batch_size=size).probabilities(live, "t") for size in (1, 5))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_ready_tokens_without_a_mask_are_all_read(tmp_path):
    model, folder = checkpoint("gpt2", tmp_path / "m")
    ids = torch.randint(3, 12, (4, 6))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    found = evaluator(TaskData("t", tmp_path / "ids.safetensors", folder), "language_model")(model, "t")
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.details["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_names_that_look_like_numbers(tmp_path):
    _, folder = checkpoint("bert", tmp_path / "m")
    task = TaskData("t", table(tmp_path / "d.tsv", [1 + i % 3 for i in range(12)]), folder)
    (tmp_path / "labels.json").write_text(json.dumps(["1", "2", "3"]))
    assert evaluator(task).labels("t").tolist()[:3] == [0, 1, 2]
    table(tmp_path / "d.tsv", [i % 3 for i in range(12)])  # 0 is no name, so these are classes
    assert evaluator(task).labels("t").tolist()[:3] == [0, 1, 2]
    table(tmp_path / "d.tsv", [1 + i % 2 for i in range(12)])
    with pytest.raises(ConfigError, match=r"class numbers, or names that look like numbers, as task 't'"):
        evaluator(task)


@pytest.mark.parametrize("names", [{"good": 2, "bad": 0, "neutral": 1}, ["good", "bad", "good"]])
def test_a_list_of_names_that_is_none(tmp_path, names):
    _, folder = checkpoint("bert", tmp_path / "m")
    (tmp_path / "labels.json").write_text(json.dumps(names))
    with pytest.raises(ConfigError, match=r"labels\.json: it must be a list of different names"):
        evaluator(TaskData("t", table(tmp_path / "d.tsv", ["good", "bad"] * 6), folder))
    # Class numbers need no names.
    assert evaluator(TaskData("t", table(tmp_path / "d.tsv", [0, 1] * 6), folder)).labels("t").tolist() == [0, 1] * 6


def test_files_of_inputs_whose_parts_do_not_fit(tmp_path):
    path = tmp_path / "d.safetensors"
    task = TaskData("t", path, tmp_path)
    pixels = torch.zeros(8, 3, 16, 16)
    for count in (6, 10):
        save_file({"pixel_values": pixels, "label": torch.zeros(count, dtype=torch.long)}, path)
        with pytest.raises(ConfigError, match=f"differ in their number of samples.*{count}"):
            evaluator(task, "image_classification")
    save_file({"label": torch.zeros(8, dtype=torch.long)}, path)
    with pytest.raises(ConfigError, match="the inputs none"):
        evaluator(task, "image_classification")
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(CheckpointError, match=r"d\.safetensors: is no safetensors file"):
        evaluator(task, "image_classification")


def test_pictures_for_a_model_of_16_bits(tmp_path):
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    model = transformers.ResNetForImageClassification(config).eval()
    pixels = torch.randn(4, 3, 32, 32)
    save_file({"pixel_values": pixels, "label": torch.zeros(4, dtype=torch.long)}, tmp_path / "d.safetensors")
    own = evaluator(TaskData("t", tmp_path / "d.safetensors", tmp_path), "image_classification")
    exact = own.probabilities(model, "t")
    torch.testing.assert_close(own.probabilities(model.bfloat16(), "t"), exact, rtol=0.05, atol=0.02)


def test_tasks_are_known_by_name(tmp_path):
    model, folder = checkpoint("bert", tmp_path / "m")
    task = TaskData("t", table(tmp_path / "d.tsv", [0] * 12), folder)
    with pytest.raises(ConfigError, match="no task 'u'; there are t"):
        evaluator(task)(model, "u")
    with pytest.raises(ConfigError, match=r"two tasks have one name \(t, t\)"):
        build_evaluator(EvaluationRecipe(kind="text_classification"), [task, task], "validation")


def test_a_function_sees_a_model_in_evaluation_mode_without_gradients():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    seen = FunctionEvaluator(lambda m, t: 2 * m[0].training + torch.is_grad_enabled(), ["t"], "validation")
    assert seen(model, "t").value == 0
    assert model.training
    with pytest.raises(DataError, match="not a finite number"):
        FunctionEvaluator(lambda m, t: Score(math.nan, 3, 0, 1, "x"), ["t"], "validation")(model, "t")


def test_scores_of_many_classes_take_memory_by_samples():
    classes = 20_000  # 400 million cells, of which a few occur
    labels = torch.randint(0, classes, (60,))
    probabilities = torch.full((60, classes), 1e-6)
    probabilities[torch.arange(60), torch.where(torch.arange(60) < 45, labels, 0)] = 0.9
    for metric, value in (("accuracy", 0.75), ("macro_f1", None)):
        found = classification_score(probabilities, labels, metric, "t")
        assert value is None or found.value == value
        assert found.low < found.value < found.high


def test_a_hopeless_language_model_scores_zero():
    found = likelihood_score(torch.tensor([8000.0]), torch.tensor([10.0]), "t")
    assert (found.value, found.details["perplexity"]) == (0.0, math.inf)


def test_the_harness_with_filters_and_its_seeds(tmp_path):
    pytest.importorskip("lm_eval")
    model, folder = checkpoint("gpt2", tmp_path / "m")
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"q": "the cat sat", "a": "mat"}) for _ in range(4)))
    task = {
        "task": "own_answer", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "d.jsonl")}},
        "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "output_type": "generate_until",
        "generation_kwargs": {"until": ["[EOS]"], "max_gen_toks": 2}, "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {"name": "strict", "filter": [{"function": "regex", "regex_pattern": "(mat)"}, {"function": "take_first"}]},
            {"name": "flexible", "filter": [{"function": "take_first"}]},
        ],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "tasks" / "all.yaml").write_text(yaml.safe_dump({"group": "own_group", "task": ["own_answer"]}))
    own = {"include_path": str(tmp_path / "tasks")}
    harness = evaluator(TaskData("t", None, folder), "lm_eval", tasks=["own_answer"], **own)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    found = harness(model.train(), "own_answer")
    assert (found.metric, found.samples) == ("exact_match", 4)
    assert model.training
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[:2]
    assert torch.equal(torch.get_rng_state(), state[2])
    with pytest.raises(ConfigError, match="'own_group' is a group"):
        evaluator(TaskData("t", None, folder), "lm_eval", tasks=["own_group"], **own)

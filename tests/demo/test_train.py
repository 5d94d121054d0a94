from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bmm_engine.demo import train as train_module
from bmm_engine.demo.classifier import load_encoder, load_head, load_tokenizer, mean_pool, save_base
from bmm_engine.demo.data import Split, Task
from bmm_engine.demo.evaluate import Evaluator, calibration_batches
from bmm_engine.demo.results import Results
from bmm_engine.demo.train import Settings, train_experts
from bmm_engine.errors import CheckpointError, ConfigError, OutputWriteError, TrainingError

SETTINGS = Settings(epochs=8, batch_size=8, learning_rate=3e-3, head_learning_rate=3e-2)
SHORT = replace(SETTINGS, epochs=1)


def word_task(name: str, first: int) -> Task:
    """Which of two words, among others, does the sentence contain?"""
    rng = random.Random(name)

    def split(size: int) -> Split:
        labels = tuple(index % 2 for index in range(size))
        fillers = (rng.choices(range(20, 40), k=rng.randint(0, 12)) for _ in labels)
        numbers = (sorted([first + label, *words]) for label, words in zip(labels, fillers, strict=True))
        return Split(tuple(" ".join(f"word{number}" for number in row) for row in numbers), labels)

    train = split(64)
    return Task(name, ("no", "yes"), train, train.texts[:16], split(16), split(32))


@pytest.fixture
def tasks() -> list[Task]:
    return [word_task("left", 0), word_task("right", 2)]


@pytest.fixture
def evaluator_parts(tiny_base: Path, tasks: list[Task]) -> tuple[nn.Module, Any, dict[str, nn.Linear]]:
    return load_encoder(tiny_base), load_tokenizer(tiny_base), {task.name: nn.Linear(16, 2) for task in tasks}


def test_two_workers_train_experts_that_learn_their_tasks(tiny_base: Path, tasks: list[Task], tmp_path: Path) -> None:
    heard: list[str] = []
    experts = train_experts(
        tasks, tiny_base, tmp_path, settings=SETTINGS, workers=2, on_ready=lambda expert: heard.append(expert.task)
    )
    assert [expert.task for expert in experts] == ["left", "right"]
    assert sorted(heard) == ["left", "right"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["left", "right"]
    for expert, task in zip(experts, tasks, strict=True):
        assert expert.test_accuracy > 0.9
        evaluator = Evaluator([task], load_tokenizer(expert.path), {task.name: expert.head()})
        assert evaluator(load_encoder(expert.path)) == {task.name: expert.test_accuracy}
        record = json.loads((expert.path / "expert.json").read_text())
        assert record["test_accuracy"] == expert.test_accuracy
        assert record["origin"]["data_sha256"] == task.digest()


def test_embeddings_stay_and_the_encoder_moves(tiny_base: Path, tasks: list[Task], tmp_path: Path) -> None:
    base = load_file(save_base(tiny_base, tmp_path / "base") / "model.safetensors")
    (expert,) = train_experts(tasks[:1], tiny_base, tmp_path / "experts", settings=SHORT, workers=0)
    trained = load_file(expert.path / "model.safetensors")
    assert trained.keys() == base.keys()  # both without a pooling layer, so that they can be merged
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(trained[words], base[words])
    query = "encoder.layer.0.attention.self.query.weight"
    assert (trained[query] - base[query]).abs().max() > 1e-3


def test_training_follows_from_the_seed(tiny_base: Path, tasks: list[Task], tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (expert,) = train_experts(tasks[:1], tiny_base, tmp_path / name, settings=replace(SHORT, seed=seed), workers=0)
        weights.append(load_file(expert.path / "model.safetensors")["encoder.layer.0.output.dense.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_experts_are_reused_until_their_origin_changes(
    tiny_base: Path, tasks: list[Task], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def reused(tasks: list[Task], settings: Settings = SHORT) -> list[bool]:
        return [expert.reused for expert in train_experts(tasks, tiny_base, tmp_path, settings=settings, workers=0)]

    assert reused(tasks) == [False, False]
    assert reused(tasks) == [True, True]
    tasks[1] = replace(tasks[1], test=tasks[1].validation)
    assert reused(tasks) == [True, False]
    assert reused(tasks, replace(SHORT, seed=1)) == [False, False]
    (tmp_path / "left" / "head.safetensors").unlink()
    (tmp_path / "right" / "expert.json").write_text("{")
    assert reused(tasks, replace(SHORT, seed=1)) == [False, False]
    assert "right holds no readable expert" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["left", "right"]


def test_an_expert_that_cannot_be_saved_leaves_nothing(
    tiny_base: Path, tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_module, "save_head", full_disk)
    with pytest.raises(OutputWriteError, match=r"expert for left.*No space left"):
        train_experts(tasks, tiny_base, tmp_path, settings=SHORT, workers=0)
    assert list(tmp_path.iterdir()) == []


def test_an_expert_that_diverges_leaves_nothing(tiny_base: Path, tasks: list[Task], tmp_path: Path) -> None:
    """In a worker: `test_narrator`."""
    diverging = replace(SETTINGS, learning_rate=math.inf)
    with pytest.raises(TrainingError, match="the loss of the expert for left is nan"):
        train_experts(tasks[:1], tiny_base, tmp_path, settings=diverging, workers=0)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_the_evaluator_agrees_with_one_sentence_at_a_time(
    tasks: list[Task], evaluator_parts: tuple[nn.Module, Any, dict[str, nn.Linear]]
) -> None:
    encoder, tokenizer, heads = evaluator_parts
    encoder.train()
    for split in ("test", "validation"):
        evaluator = Evaluator(tasks, tokenizer, heads, split=split, batch_size=5)
        scores = evaluator(encoder)
        assert encoder.training
        for task in tasks:
            rows: Split = getattr(task, split)
            right = 0
            for text, label, logits in zip(rows.texts, rows.labels, evaluator.logits(encoder, task.name), strict=True):
                encoder.eval()
                hidden = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state
                encoder.train()
                expected = heads[task.name](hidden[0].mean(dim=0))
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
                right += int(expected.argmax() == label)
            assert scores[task.name] == right / len(rows)


def test_the_evaluator_refuses_heads_that_do_not_fit(
    tasks: list[Task], evaluator_parts: tuple[nn.Module, Any, dict[str, nn.Linear]]
) -> None:
    _, tokenizer, heads = evaluator_parts
    with pytest.raises(ConfigError, match="no head for task right"):
        Evaluator(tasks, tokenizer, {"left": heads["left"]})
    with pytest.raises(ConfigError, match="task right has 2 classes, its head 3"):
        Evaluator(tasks, tokenizer, {**heads, "right": nn.Linear(16, 3)})


def test_mean_pool_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]]])
    assert torch.equal(mean_pool(hidden, torch.tensor([[1, 1, 0]])), torch.tensor([[2.0, 3.0]]))


def test_calibration_batches_hold_each_sentence_once(tasks: list[Task], tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    seen: list[str] = []
    for batch in calibration_batches(tasks[0], tokenizer, samples=10, batch_size=4):
        assert batch.keys() == {"input_ids", "attention_mask"}
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen.append(tokenizer.decode(ids[mask.bool()], skip_special_tokens=True))
            assert (ids[~mask.bool()] == tokenizer.pad_token_id).all()
    assert sorted(seen) == sorted(tasks[0].calibration[:10])
    with pytest.raises(ConfigError, match="16 calibration sentences, 17 asked for"):
        list(calibration_batches(tasks[0], tokenizer, samples=17))


def test_a_head_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "head.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="does not hold a linear head"):
        load_head(tmp_path / "head.safetensors")


def test_results_normalise_by_the_experts(tmp_path: Path) -> None:
    results = Results({"a": 0.8, "b": 0.5})
    results.add("bmm", {"b": 0.5, "a": 0.4}, seconds=1.5, anchor="tsv_m")
    results.write(tmp_path / "results.json")
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row == {
        "method": "bmm",
        "anchor": "tsv_m",
        "scores": {"a": 0.4, "b": 0.5},
        "mean": 0.45,
        "mean_normalised": 0.75,
        "worst": 0.4,
        "worst_normalised": 0.5,
        "seconds": 1.5,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(ConfigError, match="bmm has scores for"):
        results.add("bmm", {"a": 0.4}, seconds=0.0)

"""The whole demo in small: every step for real, on tiny tasks and a tiny base."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bmm_engine.demo import run as run_demo
from bmm_engine.demo import train
from bmm_engine.demo.classifier import load_encoder, load_tokenizer
from bmm_engine.demo.data import Split, Task
from bmm_engine.demo.evaluate import Evaluator
from bmm_engine.errors import OutputExistsError
from tests.conftest import WORDS

MODULE = "bmm_engine.demo.runner"


def task(name: str, words: list[str]) -> Task:
    texts = tuple(f"{words[i % 2]} {WORDS[i % 7]} {WORDS[i % 5]}" for i in range(24))
    rows = Split(texts, tuple(i % 2 for i in range(24)))
    return Task(name, ("no", "yes"), rows, texts, rows, rows)


@pytest.fixture
def output(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tasks = [task("one", WORDS[10:12]), task("two", WORDS[20:22])]
    monkeypatch.setattr(f"{MODULE}.load_tasks", lambda cache: tasks)
    monkeypatch.setattr(f"{MODULE}.base_package_dir", lambda: tiny_base)
    monkeypatch.setattr(f"{MODULE}.train_experts", partial(train.train_experts, workers=0))
    monkeypatch.setattr(f"{MODULE}.CALIBRATION_SAMPLES", 24)
    return tmp_path / "out"


def test_demo_writes_what_it_measures_and_runs_again_from_its_experts(output: Path, tiny_base: Path) -> None:
    console = Console(record=True, width=140)
    rows = run_demo(output, console=console)
    assert json.loads((output / "results.json").read_text()) == rows
    methods = [(row["method"], row["anchor"]) for row in rows]
    for anchor in ("average", "task_arithmetic", "ties", "iso_c"):
        assert {(anchor, anchor), ("bmm data", anchor), ("bmm data-free", anchor)} <= set(methods)
    assert {("experts", None), ("base", None), ("regmean", "average")} <= set(methods)
    for row in rows:
        assert set(row["scores"]) == {"one", "two"}
        assert row["mean"] == pytest.approx(sum(row["scores"].values()) / 2)
        assert row["worst"] == min(row["scores"].values())
    text = console.export_text()
    assert "trained in" in text
    assert str(output / "merged") in text

    # The checkpoint that is left behind is the row it claims to be.
    tasks = [task("one", WORDS[10:12]), task("two", WORDS[20:22])]
    heads = {t.name: train.load_head(output / "experts" / t.name / "head.safetensors") for t in tasks}
    evaluate = Evaluator(tasks, load_tokenizer(tiny_base), heads)
    claimed = next(row for row in rows if (row["method"], row["anchor"]) == ("bmm merge", "average"))
    assert evaluate(load_encoder(output / "merged")) == claimed["scores"]

    again = run_demo(output, console=(second := Console(record=True, width=140)))
    assert "trained in" not in second.export_text()
    assert [row["scores"] for row in again] == [row["scores"] for row in rows]
    assert torch.isfinite(torch.tensor([row["mean"] for row in rows])).all()


def test_the_demo_takes_no_folder_of_something_else(output: Path) -> None:
    output.mkdir()
    (output / "recipe.yaml").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"holds 'recipe\.yaml', but no demo"):
        run_demo(output, console=Console())
    assert [(p.name, p.read_text()) for p in output.iterdir()] == [("recipe.yaml", "precious")]


def test_training_again_replaces_only_an_expert(output: Path, tiny_base: Path) -> None:
    notes = output / "one" / "notes"
    notes.parent.mkdir(parents=True)
    notes.write_text("precious")
    with pytest.raises(OutputExistsError, match="one: holds 'notes', which is no part of an expert"):
        train.train_experts([task("one", WORDS[10:12])], tiny_base, output, workers=0)
    assert notes.read_text() == "precious"

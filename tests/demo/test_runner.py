"""The whole demo in small: every step for real, on tiny tasks and a tiny base."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bmm_engine.demo import train
from bmm_engine.demo.classifier import load_encoder, load_tokenizer
from bmm_engine.demo.data import Split, Task
from bmm_engine.demo.evaluate import Evaluator
from bmm_engine.demo.narrator import Narrator
from bmm_engine.demo.runner import run
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


def run_demo(output: Path) -> tuple[list[dict[str, Any]], str]:
    """Its rows, and what it says."""
    console = Console(record=True, width=100, file=io.StringIO())
    with Narrator(console) as narrator:
        rows = run(output, narrator)
    return rows, console.export_text()


def test_demo_writes_what_it_measures_and_runs_again_from_its_experts(
    output: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, text = run_demo(output)
    assert json.loads((output / "results.json").read_text()) == rows
    assert [(row["method"], row["anchor"]) for row in rows] == [
        ("experts", None),
        ("base", None),
        ("average", "average"),
        ("TSV-M", "tsv_m"),
        ("RegMean", "average"),
        ("BMM data-free", "average"),
        ("bmm merge", "average"),
    ]
    for row in rows:
        assert set(row["scores"]) == {"one", "two"}
        assert row["mean"] == pytest.approx(sum(row["scores"].values()) / 2)
        assert row["worst"] == min(row["scores"].values())
    assert "trained in" in text
    for name in ("merged", "recipe.yaml", "results.json", "results.png"):
        assert str(output / name) in text.replace("\n", "")
        assert (output / name).exists()
    assert f"inspect {output / 'recipe.yaml'}" in text.replace("\n", "")
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")

    # The checkpoint that is left behind is the row it claims to be.
    tasks = [task("one", WORDS[10:12]), task("two", WORDS[20:22])]
    heads = {t.name: train.load_head(output / "experts" / t.name / "head.safetensors") for t in tasks}
    evaluate = Evaluator(tasks, load_tokenizer(tiny_base), heads)
    assert evaluate(load_encoder(output / "merged")) == rows[-1]["scores"]

    # Again: the same experts, whatever walk was interrupted; and only the picture is missing where matplotlib is.
    (output / "merged.walk").mkdir()
    (output / "merged.walk" / "identity.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    again, text = run_demo(output)
    assert "trained in" not in text
    assert [row["scores"] for row in again] == [row["scores"] for row in rows]
    assert torch.isfinite(torch.tensor([row["mean"] for row in rows])).all()
    assert "no picture: a report needs matplotlib: pip install" in text.replace("\n", " ")
    assert (output / "results.json").exists()
    assert not (output / "results.png").exists()


def test_the_demo_takes_no_folder_of_something_else(output: Path) -> None:
    output.mkdir()
    (output / "recipe.yaml").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"holds 'recipe\.yaml', but no demo"):
        run_demo(output)
    assert [(p.name, p.read_text()) for p in output.iterdir()] == [("recipe.yaml", "precious")]


def test_training_again_replaces_only_an_expert(output: Path, tiny_base: Path) -> None:
    notes = output / "one" / "notes"
    notes.parent.mkdir(parents=True)
    notes.write_text("precious")
    with pytest.raises(OutputExistsError, match="one: holds 'notes', which is no part of an expert"):
        train.train_experts([task("one", WORDS[10:12])], tiny_base, output, workers=0)
    assert notes.read_text() == "precious"

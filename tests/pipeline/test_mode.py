"""A recipe without `mode` gets the best one that works, and says which; one that asks for a walk has it or its error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bmm_engine.cli import main
from bmm_engine.errors import ConfigError
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from tests.tiny import family, make_batches


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A base that is bare weights, so that nobody can run it; its experts are whole."""
    family("bert", tmp_path)
    (tmp_path / "base" / "config.json").unlink()
    experts = []
    for t in range(2):
        batches = [make_batches("bert", t)[0] for _ in range(5)]
        inputs = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
        save_file(inputs, tmp_path / f"inputs-{t}.safetensors")
        experts.append(
            {"model": str(tmp_path / f"expert-{t}"), "calibration": str(tmp_path / f"inputs-{t}.safetensors")}
        )
    return {"base": str(tmp_path / "base"), "experts": experts, "modules": ["*.dense", "*.query", "*.key", "*.value"]}


def test_where_no_walk_is_possible_the_mode_is_plain_and_said(raw: dict[str, Any], tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = Recipe.parse(raw)
    assert recipe.mode == "sequential"
    result = run_recipe(recipe, tmp_path / "out", progress=False, report=lines.append)
    assert result.plan.settings.mode == "plain"
    assert [line for line in lines if "mode plain, since the walk" in line and "no config.json" in line]
    run_recipe(Recipe.parse({**raw, "mode": "plain"}), tmp_path / "same", progress=False)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "same"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert len(result.modules) == 13


def test_a_walk_that_was_asked_for_is_not_replaced(raw: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        run_recipe(Recipe.parse({**raw, "mode": "sequential"}), tmp_path / "out", progress=False)


def test_inspect_says_the_mode_that_will_be(raw: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    monkeypatch.setattr(sys, "argv", ["bmm", "inspect", str(tmp_path / "recipe.yaml"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = capsys.readouterr()
    assert json.loads(said.out)["mode"] == "plain"
    assert "mode plain, since the walk" in " ".join(said.err.split())

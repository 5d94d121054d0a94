"""A recipe whose merges a function judges, at a pace that the environment sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import family

JUDGE = """
import os, time

def score(model, task):
    time.sleep(float(os.environ.get("JUDGE_SECONDS", "0")))
    weight = dict(model.named_parameters())[f"bert.encoder.layer.{int(task[-1])}.intermediate.dense.weight"]
    return 1 / (1 + float(weight.norm()))
"""


def judged_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch, search: dict[str, Any], **more: object) -> Path:
    """The recipe's file, beside its models and the judge, which processes started from now on find."""
    family("bert", folder)
    (folder / "judge.py").write_text(JUDGE)
    recipe = {
        "base": "base",
        "experts": ["expert-0", "expert-1"],
        "evaluation": {"kind": "function", "function": "judge:score"},
        "search": {"groups": "role", "optimizer": "TwoPointsDE", **search},
        **more,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return path

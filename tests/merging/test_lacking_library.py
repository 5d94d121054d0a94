"""A model of an architecture whose library is not installed: said, with patterns that give a right merge."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from safetensors.torch import save_file

from bmm_engine.checkpoint import Checkpoint
from bmm_engine.errors import CheckpointError
from bmm_engine.pipeline.inspection import describe_checkpoint
from bmm_engine.pipeline.run import plan_recipe, run_recipe
from bmm_engine.recipe.recipe import Recipe

CONFIGS = {
    "timm": {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 8, 8]}},
    "wrapper": {"architecture": "vit_tiny_patch16_224", "model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]},
    "natten": {"model_type": "dinat", "architectures": ["DinatForImageClassification"]},
}  # fmt: skip


@pytest.mark.skipif("timm" in sys.modules, reason="timm is installed")
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_modules_road_is_named_and_right(tmp_path, kind):
    shapes = {
        "cls_token": (1, 1, 4),
        "blocks.0.attn.qkv.weight": (12, 4),
        "blocks.1.mlp.fc1.weight": (8, 4),
        "head.weight": (3, 4),
    }
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        save_file({n: torch.randn(s) for n, s in shapes.items()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIGS[kind]))
    recipe = {"base": str(tmp_path / "base"), "experts": [str(tmp_path / "a"), str(tmp_path / "b")]}
    with pytest.raises(
        CheckpointError, match=r"needs a library that is not installed .*(timm|natten).*modules: \['blocks\.\*'\]"
    ) as raised:
        plan_recipe(Recipe.parse(recipe))
    shown = describe_checkpoint(str(tmp_path / "base"))
    assert "library that is not installed" in shown["linear_modules_unknown"]
    assert shown["tensors"] == 4
    # What the message recommends, taken from it.
    patterns = re.search(r"Of these files: modules: \['(.*?)'\]", str(raised.value))[1]
    result = run_recipe(Recipe.parse({**recipe, "modules": [patterns]}), tmp_path / "out", progress=False)
    assert len(result.modules) == 2
    merged, *models = (Checkpoint.open(tmp_path / n) for n in ("out", "a", "b"))
    for name in ("cls_token", "head.weight"):
        mean = torch.stack([m.load(name).double() for m in models]).mean(0)
        torch.testing.assert_close(merged.load(name).double(), mean, rtol=1e-6, atol=1e-7)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIGS[kind]

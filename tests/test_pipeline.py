from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from bmm_engine import collect_grams
from bmm_engine.calibration import read_calibration
from bmm_engine.errors import CheckpointError
from bmm_engine.pipeline import collect_from_checkpoint
from bmm_engine.recipe import CalibrationRecipe
from tests.tiny import family, make_batches


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "vit", "llama"])
def test_collecting_from_a_checkpoint_equals_collecting_from_the_model(architecture, tmp_path):
    _, experts, _, paths = family(architecture, tmp_path)
    batches = make_batches(architecture, 4)
    inputs = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    save_file(inputs, tmp_path / "inputs.safetensors")
    data = read_calibration(tmp_path / "inputs.safetensors")
    grams = collect_from_checkpoint(str(paths[0]), data, CalibrationRecipe(batch_size=4))
    live = collect_grams(experts[0], batches)
    assert grams.modules == live.modules
    assert grams.fingerprints == live.fingerprints
    assert grams.aliases == live.aliases
    for module in live.modules:
        torch.testing.assert_close(grams.get(module).total, live.get(module).total, rtol=1e-5, atol=1e-5)


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    _, _, base, _ = family("bert", tmp_path)
    (base / "config.json").write_text('{"model_type": "mystery", "architectures": ["MysteryModel"]}')
    save_file({"input_ids": torch.ones(2, 3, dtype=torch.long)}, tmp_path / "inputs.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json.*Give the linear modules"):
        collect_from_checkpoint(str(base), read_calibration(tmp_path / "inputs.safetensors"), CalibrationRecipe())

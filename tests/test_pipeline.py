from __future__ import annotations

import json

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


def test_a_folder_of_images_goes_through_the_checkpoints_own_processor(tmp_path):
    from PIL import Image

    _, experts, _, paths = family("vit", tmp_path / "models")
    settings = {
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
    }
    (paths[0] / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", **settings})
    )
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (50 * i, 255 - 50 * i, 0)).save(folder / f"{i}.png")
    grams = collect_from_checkpoint(str(paths[0]), read_calibration(folder), CalibrationRecipe(batch_size=2))
    colours = (
        torch.tensor([[50 * i, 255 - 50 * i, 0] for i in range(5)]) / 255 * 2 - 1
    )  # what mean and std of a half make of them
    pixels = colours[:, :, None, None].expand(5, 3, 16, 16)
    live = collect_grams(experts[0], [{"pixel_values": pixels}])
    for module in live.modules:
        torch.testing.assert_close(grams.get(module).total, live.get(module).total, rtol=1e-4, atol=1e-4)


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    _, _, base, _ = family("bert", tmp_path)
    (base / "config.json").write_text('{"model_type": "mystery", "architectures": ["MysteryModel"]}')
    save_file({"input_ids": torch.ones(2, 3, dtype=torch.long)}, tmp_path / "inputs.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json.*Give the linear modules"):
        collect_from_checkpoint(str(base), read_calibration(tmp_path / "inputs.safetensors"), CalibrationRecipe())

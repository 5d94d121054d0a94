"""Calibration whose pictures are patches, as many for each sample as its grid says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from bmm_engine.errors import ConfigError
from bmm_engine.statistics.calibration import read_calibration


def test_batches_hold_the_patches_of_their_samples(tmp_path):
    grid = torch.tensor([[1, 2, 2], [1, 1, 3], [2, 2, 1], [1, 4, 2], [1, 1, 1]])  # 4, 3, 4, 8, 1 patches
    patches = torch.arange(20.0)[:, None].repeat(1, 6)
    save_file(
        {"pixel_values": patches, "image_grid_thw": grid, "input_ids": torch.arange(15).reshape(5, 3)},
        tmp_path / "inputs.safetensors",
    )
    data = read_calibration(tmp_path / "inputs.safetensors")
    assert len(data) == 5
    batches = list(data.batches(tmp_path, batch_size=2, max_length=8))
    assert [b["pixel_values"][:, 0].tolist() for b in batches] == [
        list(range(7)),
        list(range(7, 19)),
        [19.0],
    ]
    assert torch.equal(torch.cat([b["image_grid_thw"] for b in batches]), grid)
    few = read_calibration(tmp_path / "inputs.safetensors", samples=2)  # the first, and the third
    (batch,) = few.batches(tmp_path, batch_size=2, max_length=8)
    assert batch["pixel_values"][:, 0].tolist() == [0, 1, 2, 3, 7, 8, 9, 10]
    assert batch["input_ids"][:, 0].tolist() == [0, 6]


@pytest.mark.parametrize("rows", [19, 21, 4])
def test_patches_that_the_grids_do_not_count_are_refused(rows, tmp_path):
    save_file(
        {
            "pixel_values": torch.ones(rows, 6),
            "image_grid_thw": torch.tensor([[1, 2, 2]] * 5),
            "input_ids": torch.ones(5, 3, dtype=torch.long),
        },
        tmp_path / "inputs.safetensors",
    )
    with pytest.raises(ConfigError, match=f"differ in their number of samples.*'pixel_values': {rows}.*image_grid_thw"):
        read_calibration(tmp_path / "inputs.safetensors")

"""Model inputs whose rows are no samples: pictures as patches, one picture's after another's, beside a grid that says how many each has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Patches (patches of all samples, ...) -> their grid (samples, 3): frames, height and width of each sample's picture, in patches.
GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


def patch_counts(name: str, rows: int, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """How many rows each sample has (samples,) of the input `name`, which has so many; None for one with a row for each."""
    grid = inputs.get(GRIDS.get(name, ""))
    if grid is None or grid.dim() != 2 or grid.is_floating_point():
        return None
    counts = grid.prod(-1)
    return counts if rows != len(grid) and int(counts.sum()) == rows and bool((counts >= 0).all()) else None


def select_samples(inputs: Mapping[str, Tensor], samples: Sequence[int]) -> dict[str, Tensor]:
    """Those samples of all inputs, patches last: who counts samples counts the first input's rows."""
    index = torch.tensor(samples, dtype=torch.long)
    found, patches = {}, {}
    for name, value in inputs.items():
        counts = patch_counts(name, len(value), inputs)
        if counts is None:
            found[name] = value[index]
        else:
            parts = value.split(counts.tolist())
            patches[name] = torch.cat([parts[i] for i in samples])
    return {**found, **patches}

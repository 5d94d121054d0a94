"""mergekit's YAML configurations, read as recipes of this engine: the same merge, up to rounding and to random numbers.

What differs: arithmetic is in float32 or float64 whatever `dtype` says, which is the output's here (mergekit also casts the inputs to it);
`int8_mask` changes nothing; random pruning draws other numbers; paths are looked up beside the file first. A tokenizer may be asked for where
all models have the same: embeddings then keep all their rows, those beyond the tokenizer's tokens too. What cannot be carried over is an error
that names the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmm_engine.errors import ConfigError
from bmm_engine.recipe.mergekit.translation import Translation


def is_configuration(raw: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is mergekit's."""
    return "merge_method" in raw


def translate(raw: Mapping[str, Any], path: Path, *, local_files_only: bool = False) -> dict[str, Any]:
    """The plain values of the recipe that does what a mergekit configuration says; model paths stay as they are written.

    Headers are read only where parameters differ between several slices. Raises `ConfigError` naming the file and key.
    """
    try:
        return Translation(raw, path, local_files_only).recipe()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error

"""A candidate as a recipe, so that everything that takes recipes (merge, sample, inspect) takes the outcome of a search."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from bmm_engine.errors import OutputWriteError
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.references import AnchorRecipe
from bmm_engine.recipe.yaml_file import dump_yaml
from bmm_engine.searching.problem import Problem
from bmm_engine.searching.space import Candidate


def best_recipe(recipe: Recipe, problem: Problem, candidate: Candidate) -> Recipe:
    """`recipe` with the candidate's anchor, ridges, scales and task weights; the experts' own anchor parameters are among the anchor's."""
    found = problem.settings_of(candidate)
    return recipe.model_copy(
        update={
            "anchor": AnchorRecipe.model_validate({"name": found["anchor"], **found["anchor_parameters"]}),
            "experts": [e.model_copy(update={"parameters": {}}) for e in recipe.experts],
            "alpha": found["alpha"],
            "scale": found["scale"],
            "task_weights": found["task_weights"]
            if isinstance(found["task_weights"], str)
            else list(found["task_weights"]),
        }
    )


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """Write a recipe as YAML, whole or not at all; paths in it must be absolute. Raises `OutputWriteError`."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        text = dump_yaml(_plain(recipe.model_dump(exclude_none=True, exclude_defaults=True)))
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputWriteError(f"{path}: the recipe could not be written ({error}).") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _plain(value: Any) -> Any:
    """Lists for tuples; YAML says infinity itself."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return math.inf if value == math.inf else value

"""What makes two searches the same study: the recipe without its budget, and the files that it reads."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import bmm_engine
from bmm_engine.checkpoint.compose import checkpoints_of
from bmm_engine.checkpoint.identity import as_texts, model_digest, path_digest
from bmm_engine.merging.sources import Models
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.searching.problem import Problem

# Keys of a recipe that do not change what a trial is.
_BESIDE: dict[str, Any] = {
    "dtype": True,
    "max_shard_size": True,
    "device": True,
    "search": {"trials", "minutes", "lead"},
}


def identity_of(recipe: Recipe, models: Models, workers: int) -> dict[str, Any]:
    """Plain values; equal for searches that may go on from one another's trials. Paths are not among them, contents are."""
    plain = recipe.model_copy(update={"base": "", "experts": []}).model_dump(
        exclude=_BESIDE | {"base": True, "experts": True}
    )
    identity: dict[str, Any] = {
        "recipe": as_texts(plain),
        "base": model_digest(*checkpoints_of(models.base)),
        "experts": [],
    }
    for expert, source in zip(recipe.experts, models.experts, strict=True):
        # A Gram file that comes of calibration may not be there yet; the calibration stands for it.
        grams = expert.grams if expert.calibration is None else None
        files = [
            expert.validation,
            expert.test,
            expert.head,
            expert.calibration,
            expert.fisher,
            expert.sensitivity,
            grams,
        ]
        identity["experts"].append(
            {
                "name": expert.label,
                "model": model_digest(*checkpoints_of(source)),
                "parameters": as_texts(expert.parameters),
                "metric": expert.metric,
                "data": [None if file is None else path_digest(Path(file)) for file in files],
            }
        )
    if recipe.search.schedule == "synchronous":
        identity["workers"] = workers  # they decide what a batch is
    return identity


def models_of(problem: Problem) -> list[str]:
    """Digests of the base and the experts of a search in memory."""
    alignment = problem.plan.alignment
    return [model_digest(source) for source in (alignment.base, *(e.source for e in alignment.experts))]


def versions() -> dict[str, str]:
    """Of what a study's numbers depend on."""
    found = {"bmm_engine": bmm_engine.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "nevergrad", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found

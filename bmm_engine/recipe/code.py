"""Code that a recipe names. A recipe is data that people send each other: what it would import runs only where its reader says so."""

from __future__ import annotations

import os

from bmm_engine.errors import ConfigError, listed, shown
from bmm_engine.recipe.recipe import Recipe

# Modules (or packages of them), or folders, separated by commas.
ALLOWED = "BMM_ALLOW_CODE"


def code_of(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Key of the recipe -> (what it would run, the module or folder that it is from), for each key that names code."""
    found = {}
    evaluation, objective = recipe.evaluation, recipe.search.objective
    if evaluation is not None and evaluation.function is not None:
        found["evaluation.function"] = (evaluation.function, evaluation.function.partition(":")[0])
    if evaluation is not None and evaluation.include_path is not None and evaluation.kind == "lm_eval":
        # The harness imports the Python files that task files of the folder name.
        found["evaluation.include_path"] = (evaluation.include_path, evaluation.include_path)
    if ":" in objective and not objective.startswith("cvar@"):
        found["search.objective"] = (objective, objective.partition(":")[0])
    return found


def check_code(recipe: Recipe, allowed: bool) -> None:
    """Raise `ConfigError` for a recipe that names code, unless that is `allowed`, or listed in the environment variable `BMM_ALLOW_CODE`.

    To be called by a command before anything of the recipe runs, here or in workers; nothing is imported. Callers in Python name code themselves.
    """
    listing = {part.strip() for part in os.environ.get(ALLOWED, "").split(",") if part.strip()}
    refused = {} if allowed else {k: own for k, own in code_of(recipe).items() if not _is_listed(own[1], listing)}
    if refused:
        runs = "; ".join(f"{key} = {shown(what)}" for key, (what, _) in refused.items())
        modules = listed(origin for _, origin in refused.values())
        raise ConfigError(
            f"{runs}: the recipe names code that would be imported and run on this machine, with your rights. Where you know it and want that, add"
            f" --allow-code, or list it in the environment: {ALLOWED}={modules.replace(', ', ',')}"
        )


def _is_listed(origin: str, listing: set[str]) -> bool:
    """Whether a module, or a package that it is in, is in the list."""
    return origin in listing or any(origin.startswith(f"{name}.") for name in listing)

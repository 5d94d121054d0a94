"""The best mode that works for a recipe that says none."""

from __future__ import annotations

from bmm_engine.errors import CheckpointError, ConfigError
from bmm_engine.merging.plan import MergePlan
from bmm_engine.merging.sources import Models
from bmm_engine.progress import Report
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.sequential.skeleton import Skeleton


def in_a_mode_that_works(recipe: Recipe, models: Models, plan: MergePlan, report: Report = lambda line: None) -> Recipe:
    """The recipe itself; or, where it left its mode open and its base cannot be walked, in the mode plain, and `report` hears why. Nothing is run.
    A recipe that asks for a walk has it, or the walk's own error."""
    if recipe.mode != "sequential" or not recipe.mode_is_chosen:
        return recipe
    try:
        Skeleton.of(models, plan)
    except (CheckpointError, ConfigError) as error:
        report(f"warning: mode plain, since the walk (mode sequential) is not possible: {error}")
        return recipe.in_mode_plain()
    return recipe

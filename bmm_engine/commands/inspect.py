"""`bmm inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from bmm_engine.commands.common import Json, Offline, about, make_console, print_json


def inspect(
    source: Annotated[
        str, typer.Argument(help="A recipe (.yaml) or a checkpoint (path or hub id).", show_default=False)
    ],
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Show what a recipe would merge and what comes from the anchor, or what a checkpoint holds. Computes nothing."""
    from bmm_engine.pipeline.inspection import describe_checkpoint, describe_plan, render
    from bmm_engine.pipeline.mode import in_a_mode_that_works
    from bmm_engine.pipeline.models import open_models
    from bmm_engine.pipeline.run import plan_recipe
    from bmm_engine.recipe.recipe import Recipe

    if source.endswith((".yaml", ".yml")):
        loaded = Recipe.load(source, local_files_only=offline)
        with about(source):
            models = open_models(loaded, offline)
            plan = plan_recipe(loaded, models=models)
            loaded = in_a_mode_that_works(
                loaded, models, plan, lambda line: make_console(stderr=True).print(line, markup=False)
            )
        description = describe_plan(plan, loaded.gram_source or plan.settings.gram_source, loaded.mode or "plain")
    else:
        description = describe_checkpoint(source, local_files_only=offline)
    if as_json:
        return print_json(description)
    make_console().print(render(description))

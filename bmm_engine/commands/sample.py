"""`bmm sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bmm_engine.commands.common import (
    Json,
    Offline,
    about,
    headline,
    make_console,
    print_json,
    progress_of,
    reporter_of,
)
from bmm_engine.solving.posterior import DEFAULT_TEMPERATURE


def sample(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe, or a mergekit configuration.", show_default=False)],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many draws.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write the draws: OUTPUT/sample-0, OUTPUT/sample-1, ...", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the series of draws.")] = 0,
    temperature: Annotated[
        float, typer.Option(min=0, help="Size of the noise; 1 / sqrt(n) for n independent calibration rows.")
    ] = DEFAULT_TEMPERATURE,
    first: Annotated[int, typer.Option(min=0, help="Number of the first draw to write, to go on with a series.")] = 0,
    split: Annotated[
        str | None,
        typer.Option(
            help="Judge MAP and average on `validation` or `test` files; without --output this is done anyway.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier draws at OUTPUT.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda[:N].", show_default=False)] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Draw models from the posterior of a merge: write them, or judge their average beside the merge itself."""
    from bmm_engine.pipeline.sampling import (
        check_draws,
        check_evaluation,
        draw,
        evaluate_samples,
        prepare_samples,
        render,
    )
    from bmm_engine.recipe.recipe import Recipe

    loaded = Recipe.load(recipe, local_files_only=offline, defaults={"mode": "plain"}, device=device)
    common: dict[str, Any] = {"local_files_only": offline, "progress": progress_of(as_json)}
    common["report"] = reporter_of(as_json)
    series: dict[str, Any] = {"seed": seed, "temperature": temperature}
    judged = split is not None or output is None
    evaluation = None
    result: dict[str, Any] = {"samples": [], "evaluation": None}
    with about(recipe):
        # Both are refused before any model runs.
        if output is not None:
            check_draws(loaded, count, output=output, first=first, overwrite=overwrite, **series)
        if judged:
            check_evaluation(loaded, split)
        prepared = prepare_samples(loaded, **common)
        if output is not None:
            paths = draw(
                loaded, count, output=output, first=first, overwrite=overwrite, prepared=prepared, **series, **common
            )
            result["samples"] = [str(path) for path in paths]
        if judged:
            evaluation = evaluate_samples(loaded, count, split=split, prepared=prepared, **series, **common)
    if evaluation is not None:
        result["evaluation"] = evaluation.plain()
    if as_json:
        return print_json(result)
    console = make_console(min_width=120)
    if evaluation is not None:
        console.print(render(evaluation))
    if output is not None:
        console.print(headline(output, f": {count} draws, sample-{first} to sample-{first + count - 1}."))

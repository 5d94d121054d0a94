"""`bmm search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bmm_engine.commands.common import AllowCode, Json, Offline, about, headline, make_console, print_json, reporter_of


def search(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe, with an `evaluation`.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Where the best merge goes; its study is OUTPUT.study.", show_default=False
        ),
    ],
    trials: Annotated[
        int | None, typer.Option(min=1, help="Replace the recipe's number of trials.", show_default=False)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Ask for no more trials after so long.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Replace the recipe's seed.", show_default=False)] = None,
    objective: Annotated[
        str | None, typer.Option(help="mean, worst, cvar@q, or package.module:function.", show_default=False)
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="An optimiser that Nevergrad registers.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Local processes (GPUs), one model each.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, or `local`.", show_default=False)] = None,
    join: Annotated[bool, typer.Option("--join", help="Work for the process that drives this search.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge at OUTPUT.")] = False,
    no_merge: Annotated[bool, typer.Option("--no-merge", help="Search only; write no merge.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda[:N].", show_default=False)] = None,
    allow_code: AllowCode = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Search the ridge of each module group on validation data, and merge with the best. Killed or stopped, the same command goes on."""
    from bmm_engine.recipe.code import check_code
    from bmm_engine.recipe.recipe import Recipe
    from bmm_engine.searching.join import join_search
    from bmm_engine.searching.run import search_recipe
    from bmm_engine.searching.view import Lines, LiveView

    # Absolute, so that the best recipe can lie elsewhere.
    loaded = Recipe.load(recipe.resolve(), local_files_only=offline, device=device)
    # A function given on the command line is the user's own word.
    with about(recipe):
        check_code(loaded if objective is None else loaded.with_search(objective="mean"), allow_code)
    changes = {"trials": trials, "minutes": minutes, "seed": seed, "objective": objective, "optimizer": optimizer}
    loaded = loaded.with_search(**{key: value for key, value in changes.items() if value is not None})
    report = reporter_of(as_json)
    if join:
        with about(recipe):
            done = join_search(loaded, output, local_files_only=offline, report=report)
        if as_json:
            return print_json({"trials": done})
        make_console().print(f"{done} trials run here.")
        return None
    console = make_console(stderr=True)
    shown = console.is_terminal and not as_json
    watcher: Any = LiveView(console, loaded.search) if shown else Lines(report)
    try:
        with about(recipe):
            result = search_recipe(
                loaded,
                output,
                workers=workers,
                ray=ray,
                overwrite=overwrite,
                write_merge=not no_merge,
                local_files_only=offline,
                watcher=watcher,
                report=report,
            )
    except KeyboardInterrupt:
        report("Stopped. Every finished trial is kept; run the same command again to go on.")
        raise
    summary = {
        "study": str(result.study),
        "recipe": str(result.recipe),
        "output": None if result.output is None else str(result.output),
        "trials": result.trials,
        "seconds": result.seconds,
        "best": {"trial": result.best.number, "value": result.best.value, "parameters": result.best.parameters},
        "rows": result.rows,
    }
    if as_json:
        return print_json(summary)
    console = make_console(min_width=120)
    console.print(_table(result.rows))
    if result.output is not None:
        console.print(headline(result.output, f": merged with the best of {result.trials} trials."))
    console.print(f"The best as a recipe: {result.recipe}; see all trials: bmm report {result.study}", highlight=False)


def _table(rows: list[dict[str, Any]]) -> Any:
    """Objective and scores in percent, the test set's beside the validation's where there is one."""
    from rich.table import Table

    splits = [split for split in ("validation", "test") if split in rows[0]]
    tasks = list(rows[0][splits[0]]["scores"])
    table = Table("", *(f"{split}\nobjective" for split in splits), title="Scores, % (95 % interval of a task's mean)")
    for task in tasks:
        table.add_column(f"{task}\n{splits[-1]}", justify="right")
    for row in rows:
        cells = [f"{100 * row[split]['objective']:.2f}" if split in row else "" for split in splits]
        for task in tasks:
            score = row.get(splits[-1], {}).get("scores", {}).get(task)
            cells.append("" if score is None else _score(score))
        table.add_row(row["name"], *cells)
    return table


def _score(score: dict[str, Any]) -> str:
    if not score["samples"]:
        return f"{100 * score['value']:.1f}"
    return f"{100 * score['value']:.1f} ({100 * score['low']:.1f}-{100 * score['high']:.1f})"

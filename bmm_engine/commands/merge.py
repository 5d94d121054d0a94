"""`bmm merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bmm_engine.commands.common import (
    Json,
    Offline,
    WriteTo,
    about,
    headline,
    make_console,
    print_json,
    progress_of,
    reporter_of,
)


def merge(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe, or a mergekit configuration.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.", show_default=False)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier merge at OUTPUT, unless other files lie in it.")
    ] = False,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="Walk through the network (mode: sequential), whatever the recipe says."),
    ] = False,
    anchor: Annotated[str | None, typer.Option(help="Replace the recipe's anchor.", show_default=False)] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Replace the recipe's relative ridge.", show_default=False)
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Replace the recipe's scale.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="Replace the output's dtype.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda[:N].", show_default=False)] = None,
    unchecked_statistics: Annotated[
        bool,
        typer.Option("--unchecked-statistics", help="Take Gram files that do not say which weights they belong to."),
    ] = False,
    write_to: WriteTo = None,
    unchecked_configs: Annotated[
        bool,
        typer.Option("--unchecked-configs", help="Merge although configs do not fit each other or the weights."),
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Carry out a recipe: collect missing Grams, merge, write a Hugging Face checkpoint.

    A merge that was killed is made by the same command run again; a sequential one, whose state lies in OUTPUT.walk, goes on where it was. Grams and
    the like, which a recipe has measured, are written only into its folder, the working folder, or one named with --write-to.
    """
    from bmm_engine.merging.accounting import loads_back
    from bmm_engine.merging.outcomes import told
    from bmm_engine.pipeline.run import run_recipe
    from bmm_engine.recipe.recipe import Recipe

    loaded = Recipe.load(
        recipe,
        local_files_only=offline,
        write_to=write_to or (),
        mode="sequential" if sequential else None,
        anchor=anchor,
        alpha=alpha,
        scale=scale,
        dtype=dtype,
        device=device,
        unchecked_statistics=unchecked_statistics or None,
        unchecked_configs=unchecked_configs or None,
    )
    with about(recipe):
        result = run_recipe(
            loaded,
            output,
            overwrite=overwrite,
            local_files_only=offline,
            progress=progress_of(as_json),
            report=reporter_of(as_json),
        )
    summary = {"output": str(result.path), **result.summary()}
    if as_json:
        return print_json(summary)
    console = make_console()
    done = (
        f": {summary['solved_modules']} modules solved, {summary['tensors_from_anchor']} tensors from the anchor"
        f" ({loaded.anchor.name}), {summary['tensors_from_base']} from the base."
    )
    console.print(headline(result.path, done))
    for label, own in summary["tensors"].items():
        console.print(f"{label}: {told(own)}", highlight=False, markup=False)
    _print_left_out(console, summary)
    jittered = [m["module"] for m in summary["modules"] if m["jitter"]]
    if jittered:
        console.print(f"{len(jittered)} modules needed jitter (first: {jittered[0]}); a larger alpha avoids it.")
    if result.plan.settings.mode == "sequential":
        console.print(
            f"How much each input drifted, and what is left of it, is in bmm_merge.json; see it with bmm report {result.path}."
        )
    fault = None if result.path is None else loads_back(result.path)
    if fault:
        console.print(f"It does not load as it was written: {fault}", highlight=False, markup=False)
        return
    if fault is None:
        console.print("Whether it loads was not checked: transformers does not know its architecture.")
    console.print(f'Load it with AutoModel.from_pretrained("{result.path}").', highlight=False)


def _print_left_out(console: Any, summary: dict[str, Any]) -> None:
    if summary["modules_without_gram"]:
        names = summary["modules_without_gram"]
        console.print(f"No Gram covers {len(names)} linear modules (first: {names[0]}); they come from the anchor.")
    for label, names in summary["left_out_of_experts"].items():
        console.print(
            f"{label}: {len(names)} tensors that the base lacks were left out (first: {names[0]}).", highlight=False
        )

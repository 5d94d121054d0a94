"""`bmm`: one thin function per command. Errors are one paragraph and exit code 2; `--json` prints plain values on standard output."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from bmm_engine.errors import BmmError, ConfigError

app = typer.Typer(
    name="bmm",
    help="Merge fine-tuned models of one base in closed form (Bayesian Model Merging).",
    epilog="Start with `bmm demo`. Errors show their traceback with `bmm --debug COMMAND ...`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the hub; use local files and the hub's cache.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads (default: torch's choice).")
    ] = None,
) -> None:
    if debug:
        os.environ["BMM_DEBUG"] = "1"
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe, or a mergekit configuration.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge at OUTPUT.")] = False,
    anchor: Annotated[str | None, typer.Option(help="Replace the recipe's anchor.", show_default=False)] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Replace the recipe's relative ridge.", show_default=False)
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Replace the recipe's scale.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="Replace the output's dtype.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda[:N].", show_default=False)] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Carry out a recipe: collect missing Grams, merge, write a Hugging Face checkpoint."""
    from bmm_engine.pipeline import run_recipe
    from bmm_engine.recipe import Recipe

    loaded = Recipe.load(
        recipe, local_files_only=offline, anchor=anchor, alpha=alpha, scale=scale, dtype=dtype, device=device
    )
    result = run_recipe(
        loaded,
        output,
        overwrite=overwrite,
        local_files_only=offline,
        progress=_progress(as_json),
        report=_reporter(as_json),
    )
    summary = {"output": str(result.path), **result.summary()}
    if as_json:
        return _print_json(summary)
    console = _console()
    console.print(
        f"[bold]{result.path}[/bold]: {summary['solved_modules']} modules solved, {summary['tensors_from_anchor']} tensors from the anchor"
        f" ({loaded.anchor.name}), {summary['tensors_from_base']} from the base."
    )
    _print_left_out(console, summary)
    jittered = [m["module"] for m in summary["modules"] if m["jitter"]]
    if jittered:
        console.print(f"{len(jittered)} modules needed jitter (first: {jittered[0]}); a larger alpha avoids it.")
    console.print(f'Load it with AutoModel.from_pretrained("{result.path}").', highlight=False)


@app.command()
def collect(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint (path or hub id), or a recipe (.yaml) for all its experts.", show_default=False
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Calibration: .txt, .jsonl, .csv, .tsv, .safetensors of model inputs, or a folder of images.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The Gram file (.safetensors).", show_default=False)
    ] = None,
    modules: Annotated[
        list[str] | None, typer.Option("--modules", help="Pattern of module names; repeatable.", show_default=False)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples, spread evenly over the data.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens per text.")] = 128,
    field: Annotated[str, typer.Option(help="The text column of .jsonl, .csv and .tsv.")] = "text",
    dtype: Annotated[str, typer.Option(help="The model runs in float32, bfloat16 or float16.")] = "float32",
    fisher: Annotated[bool, typer.Option("--fisher", help="Measure Fisher information instead of Grams.")] = False,
    labels: Annotated[str, typer.Option(help="For --fisher: expected, or sampled (language models).")] = "expected",
    base: Annotated[
        str | None, typer.Option(help="The base of a LoRA adapter that is to be measured.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda[:N].")] = "cpu",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Measure an expert on its calibration data, once for all merges: its Grams, or its Fisher information."""
    from bmm_engine.calibration import read_calibration
    from bmm_engine.measure import Models, collect_from_checkpoint, fisher_from_checkpoint, fisher_sets, gram_sets
    from bmm_engine.recipe import Recipe

    what = "fisher" if fisher else "grams"
    report, progress = _reporter(as_json), _progress(as_json)
    sets: list[Any]
    if source.endswith((".yaml", ".yml")):
        loaded = Recipe.load(source, local_files_only=offline)
        paths = [getattr(e, what) for e in loaded.experts]
        if None in paths:
            label = loaded.experts[paths.index(None)].label
            raise ConfigError(f"{source}: expert {label!r} has no `{what}` to save to; give every expert a path there.")
        if fisher:
            sets = fisher_sets(loaded, Models(offline), report=report, progress=progress)
        else:
            from bmm_engine.anchors import get_anchor

            walk = get_anchor(loaded.anchor.name).needs == "sequential_grams"
            sets = gram_sets(loaded, Models(offline), report=report, sequential=walk, progress=progress)
        files = [str(path) for path in paths]
    else:
        if data is None or output is None:
            raise ConfigError(
                "bmm collect CHECKPOINT DATA -o FILE.safetensors: the data and the output file are needed."
            )
        raw = {"samples": samples, "batch_size": batch_size, "max_length": max_length, "field": field}
        raw |= {"dtype": dtype, "fisher_labels": labels}
        recipe = Recipe.parse({"base": base or source, "experts": [source], "calibration": raw}, "bmm collect")
        models, own = Models(offline), read_calibration(data, samples=samples, field=field)
        model = models.source(source) if base is None else models.expert(recipe, recipe.experts[0])
        options: dict[str, Any] = {"device": device, "progress": progress}
        if fisher:
            sets = [fisher_from_checkpoint(model, own, recipe.calibration, **options)]
        else:
            sets = [collect_from_checkpoint(model, own, recipe.calibration, modules=modules or None, **options)]
        files = [str(sets[0].save(output))]
    summaries = [_measured(s, file) for file, s in zip(files, sets, strict=True)]
    if as_json:
        return _print_json(summaries)
    for summary in summaries:
        _console().print(f"[bold]{summary['file']}[/bold]: {summary['what']}, from {summary['calibration']}.")


def _measured(found: Any, file: str) -> dict[str, Any]:
    """What a file of Grams or Fisher information holds."""
    from bmm_engine.grams import GramSet

    if isinstance(found, GramSet):
        grams = len(set(found.modules.values()))
        counts = {
            "modules": len(found.modules),
            "grams": grams,
            "what": f"{grams} Grams for {len(found.modules)} modules",
        }
    else:
        counts = {"parameters": len(found.names), "what": f"Fisher information of {len(found.names)} parameters"}
    return {"file": file, **counts, "calibration": found.calibration}


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(help="A recipe (.yaml) or a checkpoint (path or hub id).", show_default=False)
    ],
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Show what a recipe would merge and what comes from the anchor, or what a checkpoint holds. Computes nothing."""
    from bmm_engine.inspection import describe_checkpoint, describe_plan, render
    from bmm_engine.pipeline import plan_recipe
    from bmm_engine.recipe import Recipe

    if source.endswith((".yaml", ".yml")):
        loaded = Recipe.load(source, local_files_only=offline)
        plan = plan_recipe(loaded, local_files_only=offline)
        description = describe_plan(plan, loaded.gram_source or plan.settings.gram_source)
    else:
        description = describe_checkpoint(source, local_files_only=offline)
    if as_json:
        return _print_json(description)
    _console().print(render(description))


@app.command()
def anchors(
    name: Annotated[str | None, typer.Argument(help="One rule, in full.", show_default=False)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in markdown.")] = False,
    as_json: Json = False,
) -> None:
    """List the merging rules with their parameters and papers, or explain one."""
    from bmm_engine.anchors import get_anchor, table

    if markdown:
        sys.stdout.write(table.markdown() + "\n")
        return
    rows = [row for row in table.rows() if name is None or row["name"] == get_anchor(name).name]
    if as_json:
        return _print_json(rows)
    console = _console(min_width=150)
    if name is not None:
        return _explain_anchor(console, get_anchor(name))
    from rich.table import Table

    shown = Table(
        "name", "scope", "parameters", "paper", caption="* may differ between experts; `bmm anchors NAME` explains one"
    )
    for row in rows:
        parameters = ", ".join(table.parameter_text(p) for p in row["parameters"])
        shown.add_row(
            row["name"], row["scope"] + (f", needs {row['needs']}" if row["needs"] else ""), parameters, row["paper"]
        )
    console.print(shown)


def _explain_anchor(console: Any, rule: Any) -> None:
    import inspect

    from rich.markup import escape
    from rich.table import Table

    from bmm_engine.anchors.table import plain

    text = escape(inspect.getdoc(rule.rule) or "")
    console.print(f"[bold]{rule.name}[/bold], {rule.scope} scope: {escape(rule.paper)}\n\n{text}\n", highlight=False)
    parameters = Table("parameter", "type", "default", "for each expert")
    for p in rule.schema:
        parameters.add_row(p["name"], p["type"], plain(p["default"]), "yes" if p["per_expert"] else "no")
    console.print(parameters)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where experts, tables and the merged model go.")
    ] = Path("demo_output"),
    as_json: Json = False,
) -> None:
    """Fine-tune experts on real tasks, merge them in every way, and print one table of what each merge is worth."""
    from bmm_engine.demo import run

    rows = run(output, console=_console(stderr=as_json, min_width=150))
    if as_json:
        _print_json(rows)


def main() -> None:
    """Entry point of the command `bmm`."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app()
    except BmmError as error:
        if os.environ.get("BMM_DEBUG"):
            raise
        _say("error: ", "bold red", str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _say("interrupted", "bold red", "; nothing half-written was left behind.")
        raise SystemExit(130) from None


def _show_warning(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
    _say("warning: ", "bold yellow", str(message))


def _say(label: str, style: str, text: str) -> None:
    from rich.text import Text

    _console(stderr=True).print(Text.assemble((label, style), text))


def _console(stderr: bool = False, min_width: int = 0) -> Any:
    from rich.console import Console

    console = Console(stderr=stderr, soft_wrap=not sys.stdout.isatty())
    if not console.is_terminal:
        console.width = max(console.width, min_width)  # a file or pipe has no width that a table should bow to
    return console


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def _progress(as_json: bool) -> bool | None:
    return False if as_json else None


def _reporter(as_json: bool) -> Any:
    console = _console(stderr=True)
    return (lambda line: None) if as_json else (lambda line: console.print(line, highlight=False))


def _print_left_out(console: Any, summary: dict[str, Any]) -> None:
    if summary["modules_without_gram"]:
        names = summary["modules_without_gram"]
        console.print(f"No Gram covers {len(names)} linear modules (first: {names[0]}); they come from the anchor.")
    for label, names in summary["left_out_of_experts"].items():
        console.print(
            f"{label}: {len(names)} tensors that the base lacks were left out (first: {names[0]}).", highlight=False
        )

"""`bmm collect`."""

from __future__ import annotations

from dataclasses import replace
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
from bmm_engine.errors import ConfigError


def collect(
    context: typer.Context,
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
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Measure how much predictions depend on each module's outputs instead."),
    ] = False,
    head: Annotated[
        Path | None,
        typer.Option(help="For --sensitivity of a bare encoder: its linear head (.safetensors).", show_default=False),
    ] = None,
    pooling: Annotated[str, typer.Option(help="What `--head` reads: mean or cls.")] = "mean",
    labels: Annotated[
        str, typer.Option(help="For --fisher: expected, sampled (language models), or data (the file's own).")
    ] = "expected",
    base: Annotated[
        str | None, typer.Option(help="The base of a LoRA adapter that is to be measured.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Of a recipe: local processes, one expert each at a time.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Of a recipe: address of a Ray cluster, or `local`.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda[:N]; of a recipe, instead of its own.", show_default=False)
    ] = None,
    write_to: WriteTo = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Measure an expert on its calibration data, once for all merges: its Grams, its Fisher information, or its sensitivities."""
    from bmm_engine.executors.devices import check_device
    from bmm_engine.pipeline.measure import collect_from_checkpoint, fisher_from_checkpoint, sensitivity_from_checkpoint
    from bmm_engine.pipeline.models import ModelOpener, open_models, preparing_folder
    from bmm_engine.pipeline.statistics import fisher_sets, gram_sets, sensitivity_sets
    from bmm_engine.recipe.recipe import Recipe
    from bmm_engine.statistics.calibration import read_calibration
    from bmm_engine.statistics.records import check_replaceable
    from bmm_engine.statistics.text_file import check_output_path

    if device is not None:
        check_device(device)
    if output is not None:
        check_output_path(output)
    if fisher and sensitivity:
        raise ConfigError("--fisher and --sensitivity are measured one at a time.")
    if head is not None and not sensitivity:
        raise ConfigError(
            "--head is for --sensitivity: Grams are of the encoder alone, and --fisher needs a model that gives logits."
        )
    if pooling not in ("mean", "cls"):
        raise ConfigError(f"--pooling must be mean or cls, not {pooling!r}.")
    what = "fisher" if fisher else "sensitivity" if sensitivity else "grams"
    report, progress = reporter_of(as_json), progress_of(as_json)
    sets: list[Any]
    of_recipe = source.endswith((".yaml", ".yml"))
    _refuse_unused(context, source, of_recipe)
    if of_recipe:
        loaded = Recipe.load(source, local_files_only=offline, write_to=write_to or (), device=device)
        check_device(loaded.device)
        paths = [getattr(e, what) for e in loaded.experts]
        if None in paths:
            label = loaded.experts[paths.index(None)].label
            raise ConfigError(f"{source}: expert {label!r} has no `{what}` to save to; give every expert a path there.")
        with about(source):
            if fisher:
                sets = fisher_sets(loaded, open_models(loaded, offline), report=report, progress=progress)
            elif sensitivity:
                sets = sensitivity_sets(loaded, open_models(loaded, offline), report=report, progress=progress)
            else:
                walk = "sequential_grams" in loaded.settings.anchor_needs
                if (workers > 1 or ray is not None) and not walk:
                    _spread(loaded, Path(source), workers, ray, offline, report)
                sets = gram_sets(
                    loaded, open_models(loaded, offline), report=report, sequential=walk, progress=progress
                )
        files = [str(path) for path in paths]
    else:
        if data is None or output is None:
            raise ConfigError(
                "bmm collect CHECKPOINT DATA -o FILE.safetensors: the data and the output file are needed."
            )
        check_replaceable(output, f"bmm-{what}", what)  # before any model runs
        raw = {"samples": samples, "batch_size": batch_size, "max_length": max_length, "field": field}
        raw |= {"dtype": dtype, "fisher_labels": labels}
        recipe = Recipe.parse({"base": base or source, "experts": [source], "calibration": raw}, "bmm collect")
        opener, own = ModelOpener(offline), read_calibration(data, samples=samples, field=field)
        root = opener.source(recipe.base)
        model = root if base is None else opener.expert(root, recipe.experts[0])
        if own.inputs is None:
            folder = preparing_folder(model, root, images=bool(own.images), report=report)
            own = replace(own, prepared_by=folder)
        options: dict[str, Any] = {"device": device or "cpu", "progress": progress}
        if fisher:
            sets = [fisher_from_checkpoint(model, own, recipe.calibration, **options)]
        elif sensitivity:
            options |= {"head": head, "pooling": pooling, "modules": modules or None}
            sets = [sensitivity_from_checkpoint(model, own, recipe.calibration, **options)]
        else:
            sets = [collect_from_checkpoint(model, own, recipe.calibration, modules=modules or None, **options)]
        files = [str(sets[0].save(output))]
    summaries = [_measured(s, file) for file, s in zip(files, sets, strict=True)]
    if as_json:
        return print_json(summaries)
    for summary in summaries:
        make_console().print(headline(summary["file"], f": {summary['what']}, from {summary['calibration']}."))


# Of a checkpoint only: what a recipe says of each expert, or in its section `calibration`.
_OF_CHECKPOINTS = (
    "data", "output", "modules", "samples", "batch_size", "max_length", "field", "dtype", "head", "pooling", "labels", "base",
)  # fmt: skip
_OF_RECIPES = ("workers", "ray")


def _refuse_unused(context: typer.Context, source: str, of_recipe: bool) -> None:
    """Raise `ConfigError` for an option that would be ignored."""
    for name in _OF_CHECKPOINTS if of_recipe else _OF_RECIPES:
        given = context.get_parameter_source(name)
        if given is not None and given.name != "DEFAULT":
            told = "DATA" if name == "data" else f"--{name.replace('_', '-')}"
            remedy = (
                "a recipe says this of its experts, or under `calibration`; leave it out, or change the recipe"
                if of_recipe
                else "it is for a recipe, which has several experts; leave it out"
            )
            raise ConfigError(f"{source}: {told} has no effect here: {remedy}.")


def _spread(recipe: Any, source: Path, workers: int, ray: str | None, offline: bool, report: Any) -> None:
    """Measure the experts' missing Grams in several workers, each into its file."""
    from bmm_engine.executors import open_executor
    from bmm_engine.searching.workers import with_grams

    with open_executor(workers, ray) as executor:
        with_grams(recipe, source.parent, executor, offline, report)


def _measured(found: Any, file: str) -> dict[str, Any]:
    """What a file of Grams, Fisher information or sensitivities holds."""
    from bmm_engine.statistics.grams import GramSet
    from bmm_engine.statistics.sensitivity import SensitivitySet

    if isinstance(found, GramSet):
        grams = len(set(found.modules.values()))
        counts = {
            "modules": len(found.modules),
            "grams": grams,
            "what": f"{grams} Grams for {len(found.modules)} modules",
        }
    elif isinstance(found, SensitivitySet):
        counts = {"modules": len(found.names), "what": f"sensitivities of {len(found.names)} modules"}
    else:
        counts = {"parameters": len(found.names), "what": f"Fisher information of {len(found.names)} parameters"}
    return {"file": file, **counts, "calibration": found.calibration}

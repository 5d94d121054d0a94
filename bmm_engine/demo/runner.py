"""Fetch, fine-tune, collect, merge in every way, evaluate, and leave the merged checkpoint and one table."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from bmm_engine.demo.classifier import base_package_dir, load_encoder, load_tokenizer, save_base
from bmm_engine.demo.data import Task, load_tasks
from bmm_engine.demo.evaluate import Evaluator, calibration_batches
from bmm_engine.demo.results import Results
from bmm_engine.demo.train import Expert, train_experts
from bmm_engine.disk.files import foreign, named, read_identity, write_whole
from bmm_engine.errors import OutputExistsError, OutputWriteError
from bmm_engine.merging.merge import merge
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.statistics.collect import collect_grams
from bmm_engine.statistics.grams import GramSet

ANCHORS = ("average", "task_arithmetic", "ties", "iso_c")
# Small enough that RegMean's closed form is reached to working precision, large enough for float32 Grams that lack full rank.
REGMEAN_ALPHA = 1e-5
CALIBRATION_SAMPLES = 256
_IDENTITY, _FORMAT = "bmm-demo.json", "bmm-demo"


@dataclass(frozen=True)
class Method:
    """One row of the table: a name, and the arguments of `merge` that make it."""

    name: str
    anchor: str
    options: dict[str, Any]


def methods(grams: list[GramSet]) -> Iterator[Method]:
    """The anchors by themselves, RegMean, and plain BMM on each anchor, all at their defaults: nothing here is tuned."""
    for anchor in ANCHORS:
        yield Method(anchor, anchor, {"alpha": math.inf})
    yield Method("regmean", "average", {"grams": grams, "alpha": REGMEAN_ALPHA})
    for anchor in ANCHORS:
        yield Method("bmm data", anchor, {"grams": grams})
        yield Method("bmm data-free", anchor, {"grams": "task_vectors"})


def run(output: Path, *, console: Any) -> list[dict[str, Any]]:
    """Run the demo in `output`; experts and archives found there are used again. Returns the rows that `results.json` holds.

    Raises `DownloadError`, `DataError`, `TrainingError`, and whatever a merge raises.
    """
    started = time.perf_counter()
    _take(output)
    with console.status("reading the tasks"):
        tasks = load_tasks(output / "data")
        base = save_base(base_package_dir(), output / "base")
    console.print(
        f"{len(tasks)} tasks: " + ", ".join(f"{t.name} ({len(t.train)} sentences)" for t in tasks), highlight=False
    )
    with console.status("fine-tuning one expert for each task"):
        experts = train_experts(tasks, base, output / "experts", on_ready=_expert_report(console))
    with console.status("collecting Grams"):
        grams = [_collect(task, expert, output / "grams") for task, expert in zip(tasks, experts, strict=True)]
    evaluate = Evaluator(tasks, load_tokenizer(base), {e.task: e.head() for e in experts})
    results = _compare(evaluate, base, experts, grams, console)
    recipe = _write_recipe(output, tasks, experts)
    merged = output / "merged"
    with console.status(f"bmm merge {recipe} -o {merged}"):
        merging = time.perf_counter()
        run_recipe(Recipe.load(recipe), merged, overwrite=True, progress=False)
        merging = time.perf_counter() - merging
        results.add("bmm merge", evaluate(load_encoder(merged)), seconds=merging, anchor="average")
    results.write(output / "results.json")
    console.print(results.table())
    console.print(
        f"took {time.perf_counter() - started:.0f} s; all rows are in {output / 'results.json'}", highlight=False
    )
    console.print(
        f"The merged encoder is what `bmm merge {recipe} -o {merged}` makes, everything at its default.",
        highlight=False,
    )
    console.print(f'Load it: AutoModel.from_pretrained("{merged}", add_pooling_layer=False)', highlight=False)
    return [asdict(row) for row in results.rows]


def _take(output: Path) -> None:
    """Make the demo's folder, or go on in one. Raises `OutputExistsError` for a folder of something else, `OutputWriteError`."""
    known = read_identity(output / _IDENTITY, _FORMAT) is not None
    if output.is_dir() and not known and (theirs := foreign(output, lambda name: False)):
        raise OutputExistsError(f"{output}: holds {named(theirs)}, but no demo; choose another folder.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / _IDENTITY, (json.dumps({"format": _FORMAT}) + "\n").encode())
    except OSError as error:
        raise OutputWriteError(f"{output}: cannot be written ({error}); choose another folder.") from error


def _collect(task: Task, expert: Expert, folder: Path) -> GramSet:
    encoder = load_encoder(expert.path)
    batches = list(calibration_batches(task, load_tokenizer(expert.path), samples=CALIBRATION_SAMPLES))
    description = f"{task.name}: {CALIBRATION_SAMPLES} unlabelled training sentences"
    grams = collect_grams(encoder, batches, calibration=description, progress=False)
    return GramSet.load(grams.save(folder / f"{task.name}.safetensors"))


def _compare(evaluate: Evaluator, base: Path, experts: list[Expert], grams: list[GramSet], console: Any) -> Results:
    scores = {e.task: e.test_accuracy for e in experts}  # measured by the same evaluator when the expert was trained
    results = Results(scores)
    results.add("experts", scores, seconds=sum(e.seconds for e in experts))
    encoder: nn.Module = load_encoder(base)
    results.add("base", evaluate(encoder), seconds=0.0)
    for method in methods(grams):
        label = method.name if method.name == method.anchor else f"{method.name} on {method.anchor}"
        with console.status(f"merging: {label}"):
            started = time.perf_counter()
            merged = merge(base, [e.path for e in experts], anchor=method.anchor, progress=False, **method.options)
            seconds = time.perf_counter() - started
            encoder.load_state_dict(merged.tensors or {})
            results.add(method.name, evaluate(encoder), seconds=seconds, anchor=method.anchor)
    return results


def _write_recipe(output: Path, tasks: list[Task], experts: list[Expert]) -> Path:
    """A base, experts with their heads, some of each one's own sentences: no more is said."""
    (output / "calibration").mkdir(exist_ok=True)
    for task in tasks:
        lines = (" ".join(text.split()) for text in task.calibration[:CALIBRATION_SAMPLES])
        (output / "calibration" / f"{task.name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = {
        "base": "base",
        "experts": [
            {
                "name": e.task,
                "model": f"experts/{e.task}",
                "head": f"experts/{e.task}/head.safetensors",
                "calibration": f"calibration/{e.task}.txt",
            }
            for e in experts
        ],
    }
    path = output / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _expert_report(console: Any) -> Callable[[Expert], None]:
    def report(expert: Expert) -> None:
        how = "used again" if expert.reused else f"trained in {expert.seconds:.0f} s"
        console.print(f"expert {expert.task}: {100 * expert.test_accuracy:.1f} % ({how})", highlight=False)

    return report

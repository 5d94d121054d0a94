"""Fetch, fine-tune, collect, merge, evaluate, and leave the merged checkpoint, one table and its picture."""

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

from bmm_engine.demo.classifier import MAX_TOKENS, base_package_dir, load_encoder, load_tokenizer, save_base
from bmm_engine.demo.closing import closing
from bmm_engine.demo.data import Task, load_tasks
from bmm_engine.demo.evaluate import Evaluator, calibration_batches
from bmm_engine.demo.narrator import Narrator
from bmm_engine.demo.picture import results_picture
from bmm_engine.demo.results import Result, Results
from bmm_engine.demo.train import Expert, Settings, train_experts
from bmm_engine.disk.files import foreign, named, read_identity, write_whole
from bmm_engine.errors import ConfigError, OutputExistsError, OutputWriteError
from bmm_engine.merging.merge import merge
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.progress import track
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.sequential.run import walk_folder
from bmm_engine.sequential.state import remove_folder
from bmm_engine.solving.agreement import SHRINKAGE
from bmm_engine.statistics.collect import collect_grams
from bmm_engine.statistics.grams import GramSet

# Small enough that RegMean's closed form is reached to working precision, large enough for float32 Grams that lack full rank.
REGMEAN_ALPHA = 1e-5
CALIBRATION_SAMPLES = 128
# Sorted by length: short sentences are not padded to the longest of a random draw.
TRAINING = Settings(sort_within=16)
_IDENTITY, _FORMAT = "bmm-demo.json", "bmm-demo"


@dataclass(frozen=True)
class Method:
    """One row of the table: a name, and the arguments of `merge` that make it."""

    name: str
    anchor: str
    options: dict[str, Any]


def methods(grams: list[GramSet]) -> Iterator[Method]:
    """Two rules by themselves, RegMean, and BMM without data, all at their defaults: nothing here is tuned."""
    yield Method("average", "average", {"alpha": math.inf})
    yield Method("TSV-M", "tsv_m", {"alpha": math.inf})
    yield Method("RegMean", "average", {"grams": grams, "alpha": REGMEAN_ALPHA})
    yield Method(
        "BMM data-free", "average", {"grams": "task_vectors", "sensitivities": "task_vectors", "shrinkage": SHRINKAGE}
    )


def run(output: Path, narrator: Narrator) -> list[dict[str, Any]]:
    """Run the demo in `output`; experts and archives found there are used again. Returns the rows that `results.json` holds.

    Raises `DownloadError`, `DataError`, `TrainingError`, and whatever a merge raises.
    """
    _take(output)
    with narrator.stage("reading the tasks"):
        tasks = load_tasks(output / "data")
        base = save_base(base_package_dir(), output / "base")
    narrator.say(f"{len(tasks)} tasks: " + ", ".join(f"{t.name} ({len(t.train)} sentences)" for t in tasks))
    with narrator.stage("fine-tuning one expert for each task"):
        experts = train_experts(tasks, base, output / "experts", settings=TRAINING, on_ready=_expert_report(narrator))
    with narrator.stage("measuring Grams, for RegMean"):
        pairs = track(list(zip(tasks, experts, strict=True)), "experts", show=False)
        grams = [_collect(task, expert, output / "grams") for task, expert in pairs]
    evaluate = Evaluator(tasks, load_tokenizer(base), {e.task: e.head() for e in experts})
    results = _compare(evaluate, base, experts, grams, narrator)
    recipe = _write_recipe(output, tasks, experts)
    merged = output / "merged"
    with narrator.stage(f"bmm merge {recipe} -o {merged}"):
        # An interrupted demo's walk goes on only where every number is the same, also those that depend on how many threads there are.
        if walk_folder(merged).exists():
            remove_folder(walk_folder(merged), narrator.say)
        merging = time.perf_counter()
        run_recipe(Recipe.load(recipe), merged, overwrite=True, progress=False)
        merging = time.perf_counter() - merging
    with narrator.stage("scoring bmm merge"):
        row = results.add("bmm merge", evaluate(load_encoder(merged)), seconds=merging, anchor="average")
    narrator.say(_outcome(row))
    results.write(output / "results.json")
    picture = _picture(results, output / "results.png", narrator)
    narrator.show("\nTest accuracy, %\n")
    narrator.show(results.table())
    narrator.show(closing(output, merged, recipe, picture))
    narrator.say("done")
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


def _compare(
    evaluate: Evaluator, base: Path, experts: list[Expert], grams: list[GramSet], narrator: Narrator
) -> Results:
    scores = {e.task: e.test_accuracy for e in experts}  # measured by the same evaluator when the expert was trained
    results = Results(scores)
    results.add("experts", scores, seconds=sum(e.seconds for e in experts))
    encoder: nn.Module = load_encoder(base)
    with narrator.stage("scoring base"):
        row = results.add("base", evaluate(encoder), seconds=0.0)
    narrator.say(_outcome(row))
    for method in methods(grams):
        with narrator.stage(f"merging and scoring {method.name}"):
            started = time.perf_counter()
            merged = merge(base, [e.path for e in experts], anchor=method.anchor, progress=False, **method.options)
            seconds = time.perf_counter() - started
            encoder.load_state_dict(merged.tensors or {})
            row = results.add(method.name, evaluate(encoder), seconds=seconds, anchor=method.anchor)
        narrator.say(_outcome(row))
    return results


def _write_recipe(output: Path, tasks: list[Task], experts: list[Expert]) -> Path:
    """A base, experts with their heads, some of each one's own sentences, as much of them as the experts read: no more is said."""
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
        "calibration": {"max_length": MAX_TOKENS},
    }
    path = output / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _picture(results: Results, path: Path, narrator: Narrator) -> Path | None:
    """The table comes without a picture where matplotlib is missing."""
    try:
        return results_picture(results.rows, path)
    except ConfigError as error:
        path.unlink(missing_ok=True)  # of an earlier run
        narrator.say(f"no picture: {error}")
        return None


def _expert_report(narrator: Narrator) -> Callable[[Expert], None]:
    def report(expert: Expert) -> None:
        how = "used again" if expert.reused else f"trained in {expert.seconds:.0f} s"
        narrator.say(f"expert {expert.task}: {100 * expert.test_accuracy:.1f} % ({how})")

    return report


def _outcome(row: Result) -> str:
    return f"{row.method}: {100 * row.mean:.1f} % on average, {100 * row.mean_normalised:.1f} % of the experts"

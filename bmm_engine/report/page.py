"""The page about a study."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from bmm_engine.evaluators.scores import Score
from bmm_engine.report.charts import MOST_BARS, charts
from bmm_engine.report.contents import Contents
from bmm_engine.report.document import document, save, table
from bmm_engine.report.drift import NOTE
from bmm_engine.report.figures import Chart, picture
from bmm_engine.searching.schema import Trial
from bmm_engine.searching.study import Study


def write_report(study_folder: Path, output: Path | None = None) -> Path:
    """Write `report.html`, and a PNG for each of its pictures, into the study's folder or `output`; the path of the page.

    The study may be running, killed or finished. Raises `StudyError`, `OutputWriteError`, and `ConfigError` without matplotlib.
    """
    with Study.open(study_folder, readonly=True) as study:
        contents = Contents.of(study)
    found = charts(contents)
    return save(output or Path(study_folder), page(contents, found), found)


def page(contents: Contents, found: Sequence[Chart]) -> str:
    """The HTML of a study's contents and pictures."""
    title = f"{contents.name}: search for the best merge"
    parts = [
        f"<header><h1>{escape(contents.name)}</h1><p class='lead'>{escape(_lead(contents))}</p>{_state(contents)}</header>",
        _headline(contents),
        *(f"<section class='card'><h2>{escape(c.title)}</h2>{picture(c)}{_note(c, contents)}</section>" for c in found),
        _parameters(contents),
        _lowest_alignment(contents),
        _all_trials(contents),
        _about(contents),
    ]
    return document(title, parts)


def _lead(contents: Contents) -> str:
    count = len(contents.tasks)
    anchors = " or ".join(contents.record["anchors"])
    return (
        f"{count} task{'s' if count != 1 else ''} merged into one model: the ridge of {len(contents.record['groups'])} groups of"
        f" {len(contents.record['modules'])} modules, searched on validation data. Anchor: {anchors}."
    )


def _state(contents: Contents) -> str:
    if contents.running:
        return "<p class='state'>The search is running; this page shows what is there now.</p>"
    if not contents.complete:
        return "<p class='state'>The search was stopped before its end. The same command goes on with it.</p>"
    return ""


def _headline(contents: Contents) -> str:
    best = contents.best
    if best is None:
        return "<section class='card'><p>No trial has finished yet.</p></section>"
    tiles = []
    for name, trial in contents.rows():
        values = {split: contents.value(trial, split) for split in ("validation", "test")}
        split = "validation" if values["test"] is None else "test"
        fine = split + _interval_text(contents, trial, split)
        if split == "test":
            fine += f"; validation {_percent(values['validation'])}"
        title = {"best": f"best, trial {best.number}"}.get(name, name)
        tiles.append(
            f"<div class='tile{' chief' if name == 'best' else ''}'><span>{escape(title)}</span><b>{_percent(values[split])}</b>"
            f"<small>{escape(fine)}</small></div>"
        )
    done, budget = len(contents.told), contents.record["budget"]["trials"]
    timed = [t for t in contents.told if t.seconds and t.evaluation_seconds is not None]
    outside = sum(t.seconds - (t.evaluation_seconds or 0) for t in timed if t.seconds)
    total = sum(t.seconds or 0 for t in timed)
    share = f"; {100 * outside / total:.1f} % of a trial's time is not evaluation" if total else ""
    objective = escape(str(contents.record["objective"]))
    split = "Test" if contents.test else "Validation"
    counted = f"{done} of {budget}" if budget else str(done)
    return (
        f"<section><div class='tiles'>{''.join(tiles)}</div><p class='fine'>{split} objective ({objective} of the tasks), where the experts have"
        f" 100 %. {counted} trials in {_duration(contents.seconds)}{share}.</p></section>"
    )


def _interval_text(contents: Contents, trial: Trial | None, split: str) -> str:
    """Half of the 95 % interval of the mean over tasks, from those of the tasks, which are independent."""
    scores, experts = contents.scores(trial, split), contents.experts.get(split, {})
    halves = [(s.high - s.low) / 2 / experts[t].value for t, s in scores.items() if t in experts and s.samples]
    if not halves or len(halves) != len(scores) or contents.record["objective"] != "mean":
        return ""
    return f" ± {100 * math.sqrt(sum(h * h for h in halves)) / len(halves):.1f}"


def _note(chart: Chart, contents: Contents) -> str:
    text = {
        "ridge": "Relative to the mean diagonal of the Gram: small trusts the experts' behaviour, large the anchor. A marks the anchor itself.",
        "alignment": "The cosine between the measured Gram and the task vector's estimate of it: how far a data-free merge can be trusted there.",
        "validation_test": "On the line a trial is worth on test data what it was on validation data; far below it the search has overfitted.",
        "drift": NOTE,
        "tasks": "Whiskers are 95 % bootstrap intervals.",
    }.get(chart.name, "")
    hidden = len(contents.tasks) - MOST_BARS
    if chart.name == "tasks" and hidden > 0:
        text += f" The first {MOST_BARS} tasks; the scores of all {len(contents.tasks)} are in the table of trials."
    return f"<p class='fine'>{escape(text)}</p>" if text else ""


def _parameters(contents: Contents) -> str:
    best = contents.best
    if best is None:
        return ""
    alpha, scale = best.parameters["alpha"], best.parameters["scale"]
    rows = [
        (g["name"], len(g["modules"]), _number(alpha[g["name"]]), _number(scale[g["name"]]))
        for g in contents.record["groups"]
    ]
    weights = best.parameters["task_weights"]
    told = (
        weights
        if isinstance(weights, str)
        else ", ".join(f"{t} {w:.3g}" for t, w in zip(contents.tasks, weights, strict=False))
    )
    text = f"Anchor {best.parameters['anchor']}; task weights: {told}."
    rendered = table(("group", "modules", "alpha", "scale"), rows)
    more = f"<details><summary>All {len(rows)} groups</summary>{rendered}</details>"
    return f"<section class='card'><h2>Values of the best trial</h2><p>{escape(text)}</p>{more}</section>"


def _lowest_alignment(contents: Contents) -> str:
    if not contents.alignment:
        return ""
    lowest = sorted(
        (min(own.values()), min(own, key=lambda t: own[t]), module) for module, own in contents.alignment.items() if own
    )[:8]
    rendered = table(("module", "task", "cosine"), [(module, task, f"{value:.3f}") for value, task, module in lowest])
    return f"<section class='card'><details><summary>Modules where the task vector tells least</summary>{rendered}</details></section>"


def _all_trials(contents: Contents) -> str:
    if not contents.trials:
        return ""
    rows = []
    for t in contents.trials:
        cells = [_score(t.scores.get(task)) for task in contents.tasks]
        value = "" if t.value is None else f"{100 * t.value:.2f}"
        seconds = "" if t.seconds is None else f"{t.seconds:.1f}"
        rows.append(
            (
                t.number,
                t.kind,
                t.parameters["anchor"],
                t.state if t.error is None else f"{t.state}: {t.error}",
                value,
                *cells,
                seconds,
                t.worker or "",
            )
        )
    rendered = table(("trial", "kind", "anchor", "state", "objective, %", *contents.tasks, "s", "worker"), rows)
    return f"<section class='card'><details><summary>All {len(rows)} trials</summary>{rendered}</details></section>"


def _about(contents: Contents) -> str:
    record = contents.record
    facts = {
        "optimiser": record["optimizer"],
        "seed": record["seed"],
        "objective": record["objective"],
        "budget": ", ".join(f"{value:g} {key}" for key, value in record["budget"].items() if value),
        **record.get("versions", {}),
    }
    rows = [(key, str(value)) for key, value in facts.items()]
    recipe = record.get("recipe")
    text = (
        ""
        if recipe is None
        else f"<h3>Recipe</h3><pre>{escape(json.dumps(recipe, indent=1, ensure_ascii=False))}</pre>"
    )
    rendered = table(("", ""), rows)
    return f"<section class='card'><details><summary>What this study is</summary>{rendered}{text}</details></section>"


def _score(score: Score | None) -> str:
    return "" if score is None else f"{100 * score.value:.1f}"


def _number(value: float | str) -> str:
    return "∞ (the anchor)" if float(value) == math.inf else f"{float(value):.3g}"


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

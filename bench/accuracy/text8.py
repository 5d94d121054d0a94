"""The suite text8: eight text classification sets and all-MiniLM-L6-v2."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.accuracy.experiment import Batch, Experiment, Labelled, Scorer
from bench.report import note
from bmm_engine.demo.classifier import base_package_dir, load_encoder, load_tokenizer, mean_pool, save_base, tokenize
from bmm_engine.demo.data import Sizes, Split, Task
from bmm_engine.demo.train import Expert, Settings, train_experts
from bmm_engine.errors import DataError

# Where each set can be had as a Hugging Face dataset.
SOURCES = {
    "sst2": "stanfordnlp/sst2",
    "trec6": "CogComp/trec",
    "ag_news": "fancyzhx/ag_news",
    "banking77": "PolyAI/banking77",
    "snips": "benayas/snips",
    "tweet_emotion": "cardiffnlp/tweet_eval, emotion",
    "tweet_offensive": "cardiffnlp/tweet_eval, offensive",
    "clinc_domain10": "clinc/clinc_oos, its 150 intents mapped to their 10 domains",
}
MACRO_F1 = frozenset({"tweet_emotion", "tweet_offensive"})  # as TweetEval defines: their classes are unbalanced
SIZES = Sizes(train=3000, calibration=256, validation=400, test=1000)
SEARCH_ROWS = 100  # of a task's validation split score a search's trials
MANY_CLASSES = 50


def metric(task: str) -> str:
    return "macro_f1" if task in MACRO_F1 else "accuracy"


def load(data: Path, *, names: Sequence[str] = tuple(SOURCES), seed: int, sizes: Sizes = SIZES) -> list[Task]:
    """The tasks in `data/<name>/{train,val,test}.tsv` (first line `label<TAB>text`) and `labels.json`; at most `sizes` rows of a split are drawn.
    Raises `DataError` naming what is missing and where it can be had."""
    return [_load(data / name, name, seed, sizes) for name in names]


def settings(task: Task, seed: int) -> Settings:
    """How an expert is trained: many classes need a faster head and one epoch more."""
    if len(task.labels) >= MANY_CLASSES:
        return Settings(epochs=3, learning_rate=1e-4, head_learning_rate=1e-2, seed=seed, sort_within=16)
    return Settings(epochs=2, learning_rate=1e-4, seed=seed, sort_within=16)


def prepare(data: Path, cache: Path, seed: int, *, names: Sequence[str] = (), sizes: Sizes = SIZES) -> Experiment:
    """The suite at one seed. Experts are trained where `cache` does not have them."""
    tasks = load(data, names=tuple(names) or tuple(SOURCES), seed=seed, sizes=sizes)
    base = save_base(base_package_dir(), cache / "text8" / "base")
    chosen = {task.name: settings(task, seed) for task in tasks}
    experts = train_experts(tasks, base, cache / "text8" / f"seed-{seed}", settings=chosen, on_ready=_say)
    tokenizer = load_tokenizer(base)
    heads = {expert.task: expert.head() for expert in experts}

    def scorer(split: str, limit: int | None = None) -> Scorer:
        return Scorer({t.name: _labelled(t, getattr(t, split), limit, tokenizer, heads[t.name]) for t in tasks}, _pool)

    return Experiment(
        suite="text8",
        seed=seed,
        tasks=tuple(task.name for task in tasks),
        base=base,
        experts=tuple(expert.path for expert in experts),
        calibration=lambda count: tuple(_calibration(task, count, tokenizer, seed) for task in tasks),
        samples=sizes.calibration,
        search=scorer("validation", SEARCH_ROWS),
        validation=scorer("validation"),
        test=scorer("test"),
        load=load_encoder,
        pool=_pool,
    )


def _pool(output: Any, batch: Batch) -> Tensor:
    return mean_pool(output.last_hidden_state, batch["attention_mask"])


def _calibration(task: Task, count: int, tokenizer: Any, seed: int) -> list[Batch]:
    """`count` training sentences, unlabelled: the task's own calibration rows first, then others."""
    own = set(task.calibration)
    rest = [text for text in task.train.texts if text not in own]
    texts = [*task.calibration, *random.Random(f"{seed} {task.name} more").sample(rest, len(rest))][:count]
    return [
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        for batch in tokenize(texts, tokenizer, batch_size=16)
    ]


def _say(expert: Expert) -> None:
    if not expert.reused:
        note(f"trained {expert.task} in {expert.seconds:.0f} s: test accuracy {expert.test_accuracy:.3f}")


def _labelled(task: Task, split: Split, limit: int | None, tokenizer: Any, head: nn.Linear) -> Labelled:
    batches = tokenize(split.texts[:limit], tokenizer, batch_size=64)
    labels = torch.tensor(split.labels)
    inputs = [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} for batch in batches]
    return Labelled(inputs, [labels[batch.positions] for batch in batches], head, metric(task.name))


def _load(folder: Path, name: str, seed: int, sizes: Sizes) -> Task:
    labels = _labels(folder, name)
    rng = random.Random(f"{seed} {name}")
    train_size = sizes.train * 5 // 3 if len(labels) >= MANY_CLASSES else sizes.train
    splits = {}
    for part, size in (("train", train_size), ("val", sizes.validation), ("test", sizes.test)):
        rows = _rows(folder / f"{part}.tsv", labels, name)
        # Which rows are scored does not depend on the seed: seeds differ by training and calibration alone.
        drawn = (rng if part == "train" else random.Random(name)).sample(rows, min(size, len(rows)))
        splits[part] = Split(tuple(text for text, _ in drawn), tuple(label for _, label in drawn))
    texts = splits["train"].texts
    calibration = tuple(rng.sample(texts, min(sizes.calibration, len(texts))))
    return Task(name, labels, splits["train"], calibration, splits["val"], splits["test"])


def _labels(folder: Path, name: str) -> tuple[str, ...]:
    path = folder / "labels.json"
    try:
        return tuple(str(label) for label in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. {_remedy(name)}") from error


def _rows(path: Path, labels: tuple[str, ...], name: str) -> list[tuple[str, int]]:
    try:
        header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. {_remedy(name)}") from error
    if header != "label\ttext":
        raise DataError(f"{path} begins with {header!r}, not 'label<TAB>text'. {_remedy(name)}")
    rows = []
    for number, line in enumerate(lines, start=2):
        label, tab, text = line.partition("\t")
        if not tab or not label.isdigit() or int(label) >= len(labels):
            raise DataError(
                f"{path}: line {number} is not a class below {len(labels)}, a tab and a text: {line[:80]!r}"
            )
        rows.append((text, int(label)))
    return rows


def _remedy(name: str) -> str:
    return (
        f"The set is {SOURCES.get(name, 'unknown')} on Hugging Face: write its splits as {name}/train.tsv, val.tsv and test.tsv, "
        f"each with the first line 'label<TAB>text' and one example a line, and its class names in {name}/labels.json"
    )

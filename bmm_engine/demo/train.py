"""Fine-tune one expert per task from a common base, several at a time, and reuse the ones that are already there."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmm_engine.checkpoint.ownership import may_be_written
from bmm_engine.demo.archives import sha256_of
from bmm_engine.demo.classifier import (
    MAX_TOKENS,
    load_encoder,
    load_head,
    load_tokenizer,
    pad,
    save_encoder,
    save_head,
    sentence_features,
    truncated_ids,
)
from bmm_engine.demo.data import Task
from bmm_engine.demo.evaluate import Evaluator
from bmm_engine.demo.workers import run_jobs
from bmm_engine.disk.files import foreign, is_folder, named, remove_own
from bmm_engine.errors import OutputExistsError, OutputWriteError, TrainingError
from bmm_engine.progress import track

_LOG = logging.getLogger(__name__)
_FILES = ("config.json", "model.safetensors", "head.safetensors")


@dataclass(frozen=True)
class Settings:
    """How every expert is trained: AdamW with a linearly falling learning rate, embeddings frozen.

    `sort_within`: the sentences of so many batches, drawn at random, are sorted by length before they are cut into batches, which spares
    most of the padding; 1 leaves them as drawn.

    `bfloat16`: matrix products in bfloat16. It more than halves the time on a processor that has the instructions, and triples it
    on one that has not; None uses it where they are.
    """

    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 2e-4
    head_learning_rate: float = 2e-3
    bfloat16: bool | None = None
    seed: int = 0
    sort_within: int = 1


@dataclass(frozen=True)
class Expert:
    """A fine-tuned encoder on disk; `seconds` is how long its training took when it was trained."""

    task: str
    path: Path
    test_accuracy: float
    seconds: float
    reused: bool

    def head(self) -> nn.Linear:
        return load_head(self.path / "head.safetensors")


def train_experts(
    tasks: Sequence[Task],
    base_dir: Path,
    output_dir: Path,
    *,
    settings: Settings | Mapping[str, Settings] = Settings(),
    workers: int = 2,
    on_ready: Callable[[Expert], None] | None = None,
) -> list[Expert]:
    """One expert per task, in the order of `tasks`, each saved under `output_dir / task.name`.

    A folder holds the encoder and tokenizer as a Hugging Face checkpoint, `head.safetensors`, and `expert.json`. An
    expert that is there with the same task data, base weights and settings is reused; `settings` may differ by task. `on_ready` hears of each expert
    as it becomes ready. `workers`: as in `run_jobs`.

    Raises `TrainingError` when an expert's loss is not finite or its worker fails or dies; `OutputWriteError` when an
    expert cannot be saved. Either way no half-written expert remains, and the finished ones are reused next time.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    base_sha256 = sha256_of(base_dir / "model.safetensors")
    chosen = {task.name: settings[task.name] if isinstance(settings, Mapping) else settings for task in tasks}
    origins = {task.name: _origin(task, base_sha256, chosen[task.name]) for task in tasks}
    experts: dict[str, Expert] = {}

    def ready(expert: Expert) -> None:
        experts[expert.task] = expert
        if on_ready is not None:
            on_ready(expert)

    for task in tasks:
        if (expert := _find(output_dir / task.name, origins[task.name])) is not None:
            ready(expert)
    missing = [task for task in tasks if task.name not in experts]
    for task in missing:
        _check_free(output_dir / task.name)
    jobs = {
        task.name: partial(
            _train_and_save, task, base_dir, output_dir / task.name, chosen[task.name], origins[task.name]
        )
        for task in missing
    }
    run_jobs(jobs, workers, ready)
    return [experts[task.name] for task in tasks]


def _origin(task: Task, base_sha256: str, settings: Settings) -> dict[str, Any]:
    """What an expert follows from; equal origins mean that training again would give the same expert."""
    return {
        "task": task.name,
        "data_sha256": task.digest(),
        "base_sha256": base_sha256,
        "settings": asdict(settings),
        "max_tokens": MAX_TOKENS,
    }


def _find(folder: Path, origin: dict[str, Any]) -> Expert | None:
    """The expert saved in `folder`, or None if there is none of that origin."""
    if not folder.exists():
        return None
    try:
        record = json.loads((folder / "expert.json").read_text(encoding="utf-8"))
        if all((folder / name).is_file() for name in _FILES) and record["origin"] == origin:
            return Expert(origin["task"], folder, record["test_accuracy"], record["seconds"], reused=True)
        _LOG.info("%s has another origin (data, base or settings): training again", folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _LOG.warning("%s holds no readable expert (%s): training again", folder, error)
    return None


def _check_free(folder: Path) -> None:
    """Refuse to replace anything but an earlier expert's files. Raises `OutputExistsError`."""
    if not os.path.lexists(folder):
        return
    if theirs := foreign(folder, _is_expert_file) if is_folder(folder) else [folder.name]:
        raise OutputExistsError(
            f"{folder}: holds {named(theirs)}, which is no part of an expert that this demo trained; move it elsewhere, or choose another output."
        )


def _is_expert_file(name: str) -> bool:
    return name in ("expert.json", "head.safetensors") or may_be_written(name)


def _train_and_save(task: Task, base_dir: Path, folder: Path, settings: Settings, origin: dict[str, Any]) -> Expert:
    started = time.perf_counter()
    tokenizer = load_tokenizer(base_dir)
    encoder, head = fine_tune(task, load_encoder(base_dir), tokenizer, settings)
    accuracy = Evaluator([task], tokenizer, {task.name: head})(encoder)[task.name]
    expert = Expert(task.name, folder, accuracy, time.perf_counter() - started, reused=False)

    record = {"origin": origin, "labels": task.labels, "test_accuracy": accuracy, "seconds": expert.seconds}
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir()
        save_encoder(encoder, tokenizer, unfinished)
        save_head(head, unfinished / "head.safetensors")
        (unfinished / "expert.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _check_free(folder)
        if folder.exists():
            remove_own(folder, _is_expert_file)
        unfinished.rename(folder)
    except OSError as error:
        raise OutputWriteError(f"cannot save the expert for {task.name} to {folder}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return expert


def has_bfloat16() -> bool:
    """Does this processor multiply bfloat16 matrices in hardware?"""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def fine_tune(task: Task, encoder: nn.Module, tokenizer: Any, settings: Settings) -> tuple[nn.Module, nn.Linear]:
    """Train `encoder` in place with a new linear head on the task's training rows; return both in evaluation mode.

    Weights stay float32; the matrix products may run in bfloat16 (see `Settings`). Seeded: it resets torch's
    global generator, and on one thread the same inputs give the same weights.

    Raises `TrainingError` when the loss is not finite.
    """
    torch.manual_seed(settings.seed)
    encoder.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    head = nn.Linear(encoder.config.hidden_size, len(task.labels))  # type: ignore[union-attr, arg-type]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in encoder.parameters() if p.requires_grad], "lr": settings.learning_rate},
            {"params": head.parameters(), "lr": settings.head_learning_rate},
        ],
        fused=True,
    )
    token_ids = truncated_ids(task.train.texts, tokenizer)
    labels = torch.tensor(task.train.labels)
    steps = settings.epochs * math.ceil(len(labels) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)

    bfloat16 = has_bfloat16() if settings.bfloat16 is None else settings.bfloat16
    # Trained in evaluation mode: dropout costs a third of the time and gains nothing in so few steps.
    encoder.eval()
    for epoch in range(1, settings.epochs + 1):
        batches = _batches([len(ids) for ids in token_ids], settings)
        for positions in track(batches, f"{task.name}, epoch {epoch} of {settings.epochs}", show=False):
            batch = pad([token_ids[position] for position in positions], positions, tokenizer.pad_token_id)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                logits = head(sentence_features(encoder, batch))
            loss = nn.functional.cross_entropy(logits.float(), labels[positions])
            if not loss.isfinite():
                raise TrainingError(f"the loss of the expert for {task.name} is {loss.item()}: lower its learning rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return encoder, head.requires_grad_(False)


def _batches(lengths: Sequence[int], settings: Settings) -> list[list[int]]:
    """One epoch of sentence numbers in random order, drawn from torch's global generator."""
    order = torch.randperm(len(lengths))
    if settings.sort_within == 1:
        return [rows.tolist() for rows in order.split(settings.batch_size)]
    pools = (
        sorted(pool.tolist(), key=lengths.__getitem__)
        for pool in order.split(settings.sort_within * settings.batch_size)
    )
    batches = [
        pool[start : start + settings.batch_size]
        for pool in pools
        for start in range(0, len(pool), settings.batch_size)
    ]
    return [batches[index] for index in torch.randperm(len(batches)).tolist()]

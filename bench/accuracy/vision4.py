"""The suite vision4: three sets of characters, one of traffic signs, and a small ViT that is trained on all of them first."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.accuracy.experiment import Batch, Experiment, Labelled, Scorer
from bench.report import note
from bmm_engine.demo.classifier import load_head, save_head
from bmm_engine.demo.data import Sizes
from bmm_engine.demo.train import has_bfloat16
from bmm_engine.demo.workers import run_jobs
from bmm_engine.errors import DataError, TrainingError
from bmm_engine.progress import quiet_transformers

# Where each set can be had.
SOURCES = {
    "mnist": "ylecun/mnist on Hugging Face",
    "usps": "flwrlabs/usps on Hugging Face",
    "notmnist": "the letters of notMNIST, Bulatov 2011",
    "gtsrb": "tanganke/gtsrb on Hugging Face",
}
SIZES = Sizes(train=6000, calibration=256, validation=400, test=2000)
SEARCH_ROWS = 400  # of a task's validation split score a search's trials
SIDE = 32
SHAPE = {
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Training:
    """AdamW with a rate that rises over a tenth of the steps and falls to zero; matrix products in bfloat16 where the processor has them."""

    epochs: int
    learning_rate: float
    batch_size: int = 128
    weight_decay: float = 0.05
    seed: int = 0


BASE = Training(epochs=6, learning_rate=1e-3)
EXPERT = Training(epochs=4, learning_rate=3e-4)
WORKERS = 2  # experts at once


@dataclass(frozen=True)
class Images:
    """`train`, `validation`, `test`: images (n, 3, 32, 32) in [-1, 1] and their classes (n,)."""

    name: str
    classes: int
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def prepare(data: Path, cache: Path, seed: int, *, names: Sequence[str] = (), sizes: Sizes = SIZES) -> Experiment:
    """The suite at one seed. The base and the experts are trained where `cache` does not have them."""
    tasks = [load(data / name / "data.npz", name, seed, sizes) for name in names or SOURCES]
    folder = cache / "vision4" / f"seed-{seed}"
    base = _base(tasks, folder / "base", replace(BASE, seed=seed))
    experts = _experts(tasks, base, folder, replace(EXPERT, seed=seed))
    heads = {task.name: load_head(path / "head.safetensors") for task, path in zip(tasks, experts, strict=True)}

    def scorer(split: str, limit: int | None = None) -> Scorer:
        return Scorer({t.name: _labelled(*getattr(t, split), limit, heads[t.name]) for t in tasks}, _pool)

    return Experiment(
        suite="vision4",
        seed=seed,
        tasks=tuple(task.name for task in tasks),
        base=base,
        experts=tuple(experts),
        calibration=lambda count: tuple(_calibration(task, count, seed) for task in tasks),
        samples=sizes.calibration,
        search=scorer("validation", SEARCH_ROWS),
        validation=scorer("validation"),
        test=scorer("test"),
        load=load_encoder,
        pool=_pool,
    )


def load(path: Path, name: str, seed: int, sizes: Sizes) -> Images:
    """The images in `path`: `x_train y_train x_val y_val x_test y_test names`. Raises `DataError` naming what is missing and where it can be had."""
    rng = np.random.default_rng([seed, *name.encode()])
    parts = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            classes = len(arrays["names"])
            for part, size in (("train", sizes.train), ("val", sizes.validation), ("test", sizes.test)):
                x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
                # Which images are scored does not depend on the seed.
                drawn = (rng if part == "train" else np.random.default_rng([*name.encode()])).permutation(len(x))[:size]
                parts[part] = (_pixels(x[drawn]), torch.from_numpy(y[drawn].astype(np.int64)))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. The set is {SOURCES.get(name, 'unknown')}: write its splits there as uint8 arrays"
            " x_train, x_val, x_test (n, height, width[, 3]), classes y_train, y_val, y_test (n,) and their names"
        ) from error
    return Images(name, classes, parts["train"], parts["val"], parts["test"])


def load_encoder(folder: Path) -> nn.Module:
    from transformers import ViTModel

    with quiet_transformers():
        return ViTModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()


def _calibration(task: Images, count: int, seed: int) -> list[Batch]:
    """`count` training images, unlabelled; a smaller set is part of a larger one."""
    images, _ = task.train
    order = np.random.default_rng([seed, *task.name.encode(), 1]).permutation(len(images))[:count]
    return [{"pixel_values": rows} for rows in images[torch.from_numpy(order)].split(64)]


def _pixels(x: np.ndarray) -> Tensor:
    """uint8 (n, h, w[, 3]) -> float (n, 3, 32, 32) in [-1, 1], in the middle of a black frame."""
    images = torch.from_numpy(x).float()
    images = images[:, None].expand(-1, 3, -1, -1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    height, width = images.shape[-2:]
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    padded = nn.functional.pad(images, (left, SIDE - width - left, top, SIDE - height - top))
    return (padded / 127.5 - 1).contiguous()


def _pool(output: Any, batch: Batch) -> Tensor:
    return output.last_hidden_state[:, 0]


def _labelled(images: Tensor, labels: Tensor, limit: int | None, head: nn.Linear) -> Labelled:
    inputs = [{"pixel_values": rows} for rows in images[:limit].split(128)]
    return Labelled(inputs, list(labels[:limit].split(128)), head, "accuracy")


def _base(tasks: Sequence[Images], folder: Path, training: Training) -> Path:
    from transformers import ViTConfig, ViTModel

    x = torch.cat([task.train[0] for task in tasks])
    firsts = np.cumsum([0, *(task.classes for task in tasks)])
    y = torch.cat([task.train[1] + int(first) for task, first in zip(tasks, firsts, strict=False)])

    def encoder() -> nn.Module:
        torch.manual_seed(training.seed)
        return ViTModel(ViTConfig(**SHAPE), add_pooling_layer=False)

    origin = _origin(x, y, training, {"tasks": [task.name for task in tasks]})
    return _trained(folder, encoder, x, y, int(firsts[-1]), training, origin)


def _experts(tasks: Sequence[Images], base: Path, folder: Path, training: Training) -> list[Path]:
    """Those that are missing are trained, `WORKERS` at a time."""
    run_jobs(
        {
            task.name: partial(_expert, task, base=base, folder=folder, training=training)
            for task in tasks
            if not _is_there(folder / task.name, _origin_of_expert(task, base, training))
        },
        WORKERS,
        lambda _: None,
    )
    return [folder / task.name for task in tasks]


def _expert(task: Images, base: Path, folder: Path, training: Training) -> None:
    origin = _origin_of_expert(task, base, training)
    _trained(folder / task.name, lambda: load_encoder(base), *task.train, task.classes, training, origin)


def _origin_of_expert(task: Images, base: Path, training: Training) -> dict[str, Any]:
    own = json.loads((base / "origin.json").read_text(encoding="utf-8"))
    return _origin(*task.train, training, {"base": own})


def _origin(x: Tensor, y: Tensor, training: Training, more: dict[str, Any]) -> dict[str, Any]:
    """What a model follows from."""
    digest = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
    return {**more, "data_sha256": digest, "training": asdict(training), "shape": SHAPE}


def _is_there(folder: Path, origin: dict[str, Any]) -> bool:
    kept = folder / "origin.json"
    return kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) == origin


def _trained(
    folder: Path, encoder: Any, x: Tensor, y: Tensor, classes: int, training: Training, origin: dict[str, Any]
) -> Path:
    """The encoder trained with a new head, in `folder`, unless it is there with the same origin."""
    if _is_there(folder, origin):
        return folder
    started = time.perf_counter()
    model = encoder()
    torch.manual_seed(training.seed)
    head = nn.Linear(SHAPE["hidden_size"], classes)
    _train(model, head, x, y, training, folder.name)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        with quiet_transformers():
            model.save_pretrained(unfinished)
        save_head(head, unfinished / "head.safetensors")
        (unfinished / "origin.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    note(f"trained {folder.name} in {time.perf_counter() - started:.0f} s")
    return folder


def _train(model: nn.Module, head: nn.Linear, x: Tensor, y: Tensor, training: Training, name: str) -> None:
    model.train()
    bfloat16 = has_bfloat16()
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    steps = training.epochs * math.ceil(len(x) / training.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=steps, pct_start=0.1)
    for _ in range(training.epochs):
        for rows in torch.randperm(len(x)).split(training.batch_size):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                logits = head(_pool(model(pixel_values=x[rows]), {}))
            loss = nn.functional.cross_entropy(logits.float(), y[rows])
            if not loss.isfinite():
                raise TrainingError(f"the loss of {name} is {loss.item()}: lower its learning rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    head.requires_grad_(False)

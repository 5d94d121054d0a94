"""Labelled data of a task, from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmm_engine.checkpoint.guard import parse_json, read_bytes, read_json_object
from bmm_engine.errors import ConfigError, DataError, EmptyCalibrationError
from bmm_engine.evaluators.contract import TaskData
from bmm_engine.recipe.sections import EvaluationRecipe
from bmm_engine.statistics.calibration import IMAGE_SUFFIXES, CalibrationData, read_inputs, read_rows, spread


@dataclass(frozen=True)
class LabelledData:
    """`inputs`: texts, images or tensors in the file's order; `labels` (n,) int64, each a class of the head."""

    inputs: CalibrationData
    labels: Tensor

    def take(self, rows: Sequence[int]) -> LabelledData:
        """Some of the samples, in the order given."""
        own = self.inputs
        index = torch.tensor(list(rows), dtype=torch.long)
        tensors = None if own.inputs is None else {key: value[index] for key, value in own.inputs.items()}
        chosen = replace(
            own,
            texts=tuple(own.texts[i] for i in rows) if own.texts else (),
            images=tuple(own.images[i] for i in rows) if own.images else (),
            inputs=tensors,
        )
        return LabelledData(chosen, self.labels[index])


def read_labelled(task: TaskData, options: EvaluationRecipe) -> LabelledData:
    """Read a task's `.tsv`, `.csv` or `.jsonl` (columns `field` and `label_field`), `.safetensors` (model inputs and a tensor called
    `label_field`), or folder of images with a subfolder for each class.

    Labels are class numbers, or names: of the checkpoint's `label2id`, else of a list in `labels.json` beside the data. Raises `ConfigError`
    (no file, no column, names without numbers), `EmptyCalibrationError`, `DataError` (a label that the head does not have).
    """
    path = task.path
    if path is None or not path.exists():
        raise ConfigError(f"task {task.name!r}: {path} does not exist; give its labelled data (`validation`, `test`).")
    data, raw = _read(path, options)
    if not len(data):
        raise EmptyCalibrationError(f"task {task.name!r}: {path} holds no samples.")
    found = LabelledData(data, torch.tensor(_numbers(raw, path, task), dtype=torch.long))
    return found.take(spread(range(len(data)), options.samples))


def check_labels(data: LabelledData, classes: int, task: TaskData) -> None:
    """Raise `DataError` for a label that a head of so many classes does not have."""
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{task.path}: labels run from {low} to {high}, the head of task {task.name!r} has the classes 0 to {classes - 1}. Are they in the order"
            " that the expert was trained with?"
        )


def _read(path: Path, options: EvaluationRecipe) -> tuple[CalibrationData, list[Any]]:
    if path.is_dir():
        images = [
            (p, p.relative_to(path).parts[0]) for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES
        ]
        if loose := [p for p, _ in images if p.parent == path]:
            raise ConfigError(
                f"{loose[0]}: an image without a class; put the images of each class into a folder of its name."
            )
        return CalibrationData(path, images=tuple(p for p, _ in images)), [name for _, name in images]
    if path.suffix == ".safetensors":
        tensors = read_inputs(path)
        labels = tensors.pop(options.label_field, None)
        if labels is None:
            raise ConfigError(
                f"{path}: has no tensor {options.label_field!r} of labels (it has: {', '.join(tensors)})."
            )
        if not tensors or labels.dim() != 1:
            raise ConfigError(
                f"{path}: holds labels of shape {tuple(labels.shape)} and the inputs {', '.join(tensors) or 'none'}; it needs labels (samples,) and"
                " an input of the model at least."
            )
        return CalibrationData(path, inputs=tensors), labels.tolist()
    if path.suffix == ".txt":
        raise ConfigError(
            f"{path}: a .txt file has no labels; use .tsv, .csv or .jsonl with the columns of text and label."
        )
    rows = list(read_rows(path, [options.field, options.label_field]))
    return CalibrationData(path, texts=tuple(str(text) for text, _ in rows)), [label for _, label in rows]


def _numbers(raw: Sequence[Any], path: Path, task: TaskData) -> list[int]:
    """Class numbers of labels that are numbers, or names; names that look like numbers ("1" star is class 0) are names."""
    texts = [str(label) for label in raw]
    if all(text.removeprefix("-").isdecimal() for text in texts):
        numbers, known = [int(text) for text in texts], _label_names(path, task, needed=False) or {}
        named = [known.get(text, -1) for text in texts]
        if min(named) < 0 or named == numbers:
            return numbers
        if max(numbers) < len(known):
            raise ConfigError(
                f"{path}: its labels could be class numbers, or names that look like numbers, as task {task.name!r} has them ({known}). Give the"
                " classes names that are no numbers, in the checkpoint's label2id or in labels.json, and in the data."
            )
        return named
    names = _label_names(path, task, needed=True)
    if names is None:
        raise ConfigError(
            f"{path}: its labels are names, and no number is known for them. Write class numbers, put the list of names in the head's order into"
            f" {path.parent / 'labels.json'}, or set label2id in {task.model_path / 'config.json'}."
        )
    for text in texts:
        if text not in names:
            some = ", ".join(list(names)[:5])
            raise DataError(f"{path}: the label {text!r} is none of the names of task {task.name!r} ({some} ...).")
    return [names[text] for text in texts]


def _label_names(path: Path, task: TaskData, needed: bool) -> dict[str, int] | None:
    """Name -> class number; None where nothing says so. Raises `ConfigError` for a labels.json that is no list of different names, if `needed`."""
    listed = path.parent / "labels.json"
    config = task.model_path / "config.json"
    names: dict[str, int] = {}
    if config.is_file() and task.head is None:
        names = read_json_object(config).get("label2id") or {}
    if names and not all(name.startswith("LABEL_") for name in names):
        return {name: int(number) for name, number in names.items()}
    if listed.is_file():
        found = parse_json(read_bytes(listed), str(listed), "correct it")
        if not isinstance(found, list) or len(set(map(str, found))) != len(found):
            if not needed:
                return None
            raise ConfigError(f"{listed}: it must be a list of different names, in the order of the head's classes.")
        return {str(name): number for number, name in enumerate(found)}
    return None

"""Labelled data of a task, from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, DataError, EmptyCalibrationError, cut, shown
from bmm_engine.evaluators.contract import TaskData
from bmm_engine.recipe.sections import EvaluationRecipe
from bmm_engine.statistics.calibration import CalibrationData, image_files, read_inputs, spread
from bmm_engine.statistics.rows import label_of, read_rows, text_of
from bmm_engine.statistics.text_file import check_path, read_json

LONGEST_LABEL = 1000


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
    if path is not None:
        check_path(path, f"task {shown(task.name)}")
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
        images = [(p, p.relative_to(path).parts[0]) for p in image_files(path)]
        if loose := [p for p, _ in images if p.parent == path]:
            raise ConfigError(
                f"{loose[0]}: an image without a class; put the images of each class into a folder of its name."
            )
        return CalibrationData(path, images=tuple(p for p, _ in images)), [name for _, name in images]
    if path.suffix.lower() == ".safetensors":
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
        if labels.dtype.is_floating_point or labels.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise ConfigError(f"{path}: its labels are {labels.dtype}; write them as integers, the class numbers.")
        return CalibrationData(path, inputs=tensors), labels.tolist()
    if path.suffix.lower() == ".txt":
        raise ConfigError(
            f"{path}: a .txt file has no labels; use .tsv, .csv or .jsonl with the columns of text and label."
        )
    texts: list[str] = []
    classes: list[Any] = []
    for row in read_rows(path, [options.field, options.label_field]):
        texts.append(text_of(row[options.field], row.where, options.field))
        classes.append(label_of(row[options.label_field], row.where, options.label_field))
    return CalibrationData(path, texts=tuple(texts)), classes


def _numbers(raw: Sequence[Any], path: Path, task: TaskData) -> list[int]:
    """Class numbers of labels that are numbers, or names; names that look like numbers ("1" star is class 0) are names."""
    texts = [str(label) for label in raw]
    if long := [text for text in texts if len(text) > LONGEST_LABEL]:
        raise DataError(
            f"{path}: the label {shown(long[0])} has {len(long[0])} characters. Is `label_field` the column of labels?"
        )
    if all(text.removeprefix("-").isdecimal() for text in texts):
        numbers, known = [_number(text) for text in texts], _label_names(path, task, needed=False) or {}
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
            raise DataError(
                f"{path}: the label {shown(text)} is none of the names of task {task.name!r} ({cut(some)} ...). Correct it, or the list of names."
            )
    return [names[text] for text in texts]


def _number(text: str) -> int:
    """A class number; any that no head has stays one that no head has."""
    return int(text) if len(text) < 18 else 2**62


def _label_names(path: Path, task: TaskData, needed: bool) -> dict[str, int] | None:
    """Name -> class number; None where nothing says so. Raises `ConfigError` for a labels.json that is no list of different names, if `needed`."""
    beside = path.parent / "labels.json"
    config = task.model_path / "config.json"
    names: dict[str, int] = {}
    if config.is_file() and task.head is None:
        whole = read_json(config, "the config")
        names = (whole.get("label2id") if isinstance(whole, dict) else None) or {}
        numbers = list(names.values()) if isinstance(names, dict) else [None]
        if any(type(number) is not int and not str(number).isdecimal() for number in numbers):
            raise ConfigError(f"{config}: label2id = {shown(names)}: it must map names to class numbers; correct it.")
    if names and not all(name.startswith("LABEL_") for name in names):
        return {name: _number(str(number)) for name, number in names.items()}
    if beside.is_file():
        found = read_json(beside, "the list of labels")
        if not isinstance(found, list) or len(set(map(str, found))) != len(found):
            if not needed:
                return None
            raise ConfigError(f"{beside}: it must be a list of different names, in the order of the head's classes.")
        return {str(name): number for number, name in enumerate(found)}
    return None

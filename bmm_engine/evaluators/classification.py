"""Classification of texts or images, each task read by its own head."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.errors import CheckpointError, ConfigError, shown
from bmm_engine.evaluators.contract import TaskData
from bmm_engine.evaluators.data import LabelledData, check_labels, read_labelled
from bmm_engine.evaluators.scores import Score, classification_score
from bmm_engine.models.fitted_inputs import knowing_padding, taken_inputs
from bmm_engine.recipe.sections import EvaluationRecipe

Batch = tuple[Tensor, dict[str, Tensor]]  # where its rows stand in the file, and the model's inputs


class ClassificationEvaluator:
    """Accuracy or macro-F1 of the live model's `.logits` (batch, classes). Texts are tokenised, and images processed, here and once.

    Raises what `read_labelled` and the preparation of inputs raise.
    """

    def __init__(self, tasks: Sequence[TaskData], options: EvaluationRecipe, split: str):
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise ConfigError(f"two tasks have one name ({', '.join(names)}); give each its own.")
        self._prepare(
            {task.name: task for task in tasks}, {t.name: read_labelled(t, options) for t in tasks}, options, split
        )

    def _prepare(
        self, tasks: dict[str, TaskData], data: dict[str, LabelledData], options: EvaluationRecipe, split: str
    ) -> None:
        self.tasks, self.split, self._options, self._tasks, self._data = tuple(tasks), split, options, tasks, data
        self._batches = {name: list(_batches(data[name], task, options)) for name, task in tasks.items()}

    def subset(self, share: float, seed: int) -> ClassificationEvaluator:
        """On a random share of each task's samples; a smaller share of the same seed is part of a larger one."""
        found = object.__new__(ClassificationEvaluator)
        chosen = {name: data.take(random_rows(len(data.labels), share, seed)) for name, data in self._data.items()}
        found._prepare(self._tasks, chosen, self._options, self.split)
        return found

    def __call__(self, model: nn.Module, task: str) -> Score:
        return self.score(self.probabilities(model, task), task)

    def labels(self, task: str) -> Tensor:
        """(n,) int64, in the file's order."""
        return self._data[task].labels

    @torch.inference_mode()
    def probabilities(self, model: nn.Module, task: str) -> Tensor:
        """Softmax of the logits (n, classes), float32, in the file's order."""
        if task not in self._tasks:
            raise ConfigError(f"there is no task {shown(task)}; there are {', '.join(self.tasks)}.")
        weight = next(p for p in model.parameters() if p.is_floating_point())
        was_training = model.training
        model.eval()
        result: Tensor | None = None
        try:
            for rows, inputs in self._batches[task]:
                given = taken_inputs(model, inputs) if self._data[task].inputs.texts else inputs
                with knowing_padding(model, given):
                    output = model(**{key: _like(value, weight) for key, value in given.items()})
                logits = getattr(output, "logits", None)
                if logits is None or logits.dim() != 2:
                    raise CheckpointError(
                        f"task {shown(task)}: {type(model).__name__} gives no logits (samples, classes); it needs a classification head, of its own"
                        " architecture or as a file (`head`)."
                    )
                if result is None:
                    check_labels(self._data[task], logits.shape[1], self._tasks[task])
                    result = torch.empty(len(self.labels(task)), logits.shape[1])
                result[rows] = logits.float().softmax(1).cpu()
        finally:
            model.train(was_training)
        assert result is not None
        return result

    def score(self, probabilities: Tensor, task: str) -> Score:
        """Of probabilities (n, classes) that need not be one model's."""
        return classification_score(probabilities, self.labels(task), self._tasks[task].metric, task)


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """On the model's device; pictures in its dtype too."""
    return value.to(weight.device, weight.dtype if value.is_floating_point() else None)


def random_rows(count: int, share: float, seed: int) -> list[int]:
    """The first `ceil(share count)` of a permutation that depends on the seed only, in ascending order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[: max(1, ceil(share * count))].tolist())


def _batches(data: LabelledData, task: TaskData, options: EvaluationRecipe) -> Any:
    """Samples of like length go together, padded to the longest of their batch."""
    order = data.inputs.by_length()
    ordered = data.take(order)
    index = torch.tensor(order, dtype=torch.long)
    start = 0
    for inputs in ordered.inputs.batches(
        task.preparing, batch_size=options.batch_size, max_length=options.max_length, ordered=True
    ):
        size = len(next(iter(inputs.values())))
        yield index[start : start + size], inputs
        start += size

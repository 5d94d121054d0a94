"""What scores a live model on a task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from bmm_engine.evaluators.scores import Score


@dataclass(frozen=True)
class TaskData:
    """One task: its labelled file or folder; the checkpoint folder with its config; the file of a head of its own; its metric. `prepared_by`: the
    folder of the tokenizer or image processor, where it is not the checkpoint's."""

    name: str
    path: Path | None
    model_path: Path
    head: Path | None = None
    metric: str = "accuracy"
    prepared_by: Path | None = None

    @property
    def preparing(self) -> Path:
        return self.prepared_by or self.model_path


class Evaluator(Protocol):
    """Made once, with all data prepared; a call is forward passes only, in the model's evaluation mode, on whatever device it is."""

    tasks: tuple[str, ...]
    split: str

    def __call__(self, model: nn.Module, task: str) -> Score:
        """Raises `DataError` where the model's outputs are not finite, `ConfigError` for an unknown task."""
        ...

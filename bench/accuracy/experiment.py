"""What a suite gives at one seed: a base, an expert for each task, unlabelled calibration data, and scorers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine import GramSet, SensitivitySet, collect_grams, collect_sensitivity
from bmm_engine.demo.train import has_bfloat16
from bmm_engine.evaluators.scores import Score, classification_score
from bmm_engine.models.naming import checkpoint_names

Batch = dict[str, Tensor]
Pool = Callable[[Any, Batch], Tensor]  # an encoder's output and the batch it read -> features (rows, width)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Into a live model, by its own names or by those in its checkpoint's files, which may be others (of a ViT, for one)."""
    saved = checkpoint_names(model)
    model.load_state_dict({name: tensors[name if name in tensors else saved[name]] for name in model.state_dict()})


@dataclass(frozen=True)
class Labelled:
    """A task's rows to score by: `batches` with the `labels` (rows,) of each, and the task's own `head`."""

    batches: Sequence[Batch]
    labels: Sequence[Tensor]
    head: nn.Linear
    metric: str


class Scorer:
    """Scores an encoder on every task, each through its own expert's head.

    Matrix products are in bfloat16 where the processor has them: three times as fast, and scores moved by up to 0.2 points where both were tried.
    """

    def __init__(self, tasks: Mapping[str, Labelled], pool: Pool):
        self.tasks, self._pool = dict(tasks), pool

    def __call__(self, model: nn.Module) -> dict[str, Score]:
        return {name: self.score(model, name) for name in self.tasks}

    def score(self, model: nn.Module, task: str) -> Score:
        """Accuracy or macro-F1 in [0, 1]."""
        own = self.tasks[task]
        return classification_score(self.logits(model, task).softmax(1), self.labels(task), own.metric, task)

    def labels(self, task: str) -> Tensor:
        return torch.cat(list(self.tasks[task].labels))

    @torch.inference_mode()
    def logits(self, model: nn.Module, task: str) -> Tensor:
        """(rows, classes), float64, in the order of `labels`."""
        own = self.tasks[task]
        model.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16()):
            outputs = [self._pool(model(**batch), batch) for batch in own.batches]
        return torch.cat([own.head(rows.float()) for rows in outputs]).double()


@dataclass(frozen=True)
class Experiment:
    """`calibration(n)`: n unlabelled training rows of each task, in batches; fewer are a part of more. `samples`: how many the table takes. `search`
    scores by fewer rows of the validation split than `validation` does."""

    suite: str
    seed: int
    tasks: tuple[str, ...]
    base: Path
    experts: tuple[Path, ...]
    calibration: Callable[[int], tuple[list[Batch], ...]]
    samples: int
    search: Scorer
    validation: Scorer
    test: Scorer
    load: Callable[[Path], nn.Module]
    pool: Pool

    @cached_property
    def batches(self) -> tuple[list[Batch], ...]:
        """Each expert's calibration data."""
        return self.calibration(self.samples)

    def first(self, count: int) -> Experiment:
        """Of the first tasks only."""
        return replace(
            self,
            tasks=self.tasks[:count],
            experts=self.experts[:count],
            calibration=lambda samples: self.calibration(samples)[:count],
        )

    def logits(self, task: str, output: Any, batch: Batch) -> Tensor:
        """What a task's head makes of the encoder's output: (rows, classes)."""
        return self.test.tasks[task].head(self.pool(output, batch))

    def grams(self, samples: int) -> list[GramSet]:
        """Each expert's, of so many of its calibration samples."""
        pairs = zip(self.experts, self.calibration(samples), strict=True)
        return [collect_grams(self.load(path), batches, progress=False) for path, batches in pairs]

    def sensitivities(self, samples: int) -> list[SensitivitySet]:
        """The same of its logits."""
        own = zip(self.tasks, self.experts, self.calibration(samples), strict=True)
        return [
            collect_sensitivity(self.load(path), batches, logits=partial(self.logits, task), progress=False)
            for task, path, batches in own
        ]

    def classifier(self, task: str) -> nn.Module:
        """A task's expert, giving logits in the place of hidden states; its parameters keep their names."""
        model = self.load(self.experts[self.tasks.index(task)])
        model.register_forward_hook(
            lambda module, args, kwargs, output: self.logits(task, output, kwargs), with_kwargs=True
        )
        return model

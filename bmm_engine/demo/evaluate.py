"""Score encoders on the demo's tasks, and read calibration batches from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bmm_engine.demo.classifier import Batch, sentence_features, tokenize
from bmm_engine.demo.data import Split, Task
from bmm_engine.errors import ConfigError
from bmm_engine.progress import track


class Evaluator:
    """Accuracy of an encoder on every task, where each task is read through the head of its own expert.

    The base model is scored by the same protocol, with the experts' heads: its row says what the heads alone can do
    without a fine-tuned encoder, and is lower than a linear probe trained on the base would be.

    Sentences are tokenised once, here; a call then costs forward passes only.

    Raises `ConfigError` if a task has no head, or a head that does not fit its labels.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        tokenizer: Any,
        heads: Mapping[str, nn.Linear],
        *,
        split: Literal["test", "validation"] = "test",
        batch_size: int = 64,
    ):
        self._heads = dict(heads)
        self._batches: dict[str, list[Batch]] = {}
        self._labels: dict[str, Tensor] = {}
        for task in tasks:
            head = self._heads.get(task.name)
            if head is None:
                raise ConfigError(f"no head for task {task.name}; there are heads for {sorted(self._heads)}")
            if head.out_features != len(task.labels):
                raise ConfigError(f"task {task.name} has {len(task.labels)} classes, its head {head.out_features}")
            rows: Split = getattr(task, split)
            self._batches[task.name] = tokenize(rows.texts, tokenizer, batch_size=batch_size)
            self._labels[task.name] = torch.tensor(rows.labels)

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """Accuracy in [0, 1] by task."""
        return {
            name: (self.logits(encoder, name).argmax(dim=1) == labels).double().mean().item()
            for name, labels in self._labels.items()
        }

    def labels(self, task: str) -> Tensor:
        """True labels of one task: (sentences,)."""
        return self._labels[task]

    @torch.inference_mode()
    def logits(self, encoder: nn.Module, task: str) -> Tensor:
        """What the head of one task says of every sentence, in the order of `labels`: (sentences, classes)."""
        head = self._heads[task]
        result = torch.full((len(self._labels[task]), head.out_features), torch.nan)
        was_training = encoder.training
        encoder.eval()
        try:
            for batch in track(self._batches[task], f"{task}, sentences to score", show=False):
                result[batch.positions] = head(sentence_features(encoder, batch).float().cpu())
        finally:
            encoder.train(was_training)
        return result


def calibration_batches(
    task: Task, tokenizer: Any, samples: int = 256, batch_size: int = 32
) -> Iterator[dict[str, Tensor]]:
    """The first `samples` unlabelled calibration sentences of a task as `input_ids` and `attention_mask`,
    each (rows, tokens).

    Raises `ConfigError` if the task holds fewer.
    """
    if not 0 < samples <= len(task.calibration):
        raise ConfigError(f"task {task.name} has {len(task.calibration)} calibration sentences, {samples} asked for")
    for batch in tokenize(task.calibration[:samples], tokenizer, batch_size=batch_size):
        yield {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

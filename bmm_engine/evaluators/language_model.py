"""The likelihood that a causal language model gives to texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bmm_engine.errors import ConfigError, shown
from bmm_engine.evaluators.contract import TaskData
from bmm_engine.evaluators.scores import Score, likelihood_score
from bmm_engine.recipe.sections import EvaluationRecipe
from bmm_engine.statistics.calibration import CalibrationData, read_calibration


class LanguageModelEvaluator:
    """Next-token loss of the live model's `.logits` on each task's texts; the score is the mean likelihood of a token, 1 / perplexity.

    Texts are tokenised here, once, and cut at `max_length` tokens. Raises what `read_calibration` raises.
    """

    def __init__(self, tasks: Sequence[TaskData], options: EvaluationRecipe, split: str):
        self.tasks, self.split = tuple(t.name for t in tasks), split
        self._batches: dict[str, list[dict[str, Tensor]]] = {}
        for task in tasks:
            if task.path is None:
                raise ConfigError(f"task {shown(task.name)} has no {split} texts; give their file.")
            data: CalibrationData = read_calibration(task.path, samples=options.samples, field=options.field)
            batches = data.batches(task.preparing, batch_size=options.batch_size, max_length=options.max_length)
            self._batches[task.name] = list(batches)

    @torch.inference_mode()
    def __call__(self, model: nn.Module, task: str) -> Score:
        if task not in self._batches:
            raise ConfigError(f"there is no task {shown(task)}; there are {', '.join(self.tasks)}.")
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        losses, tokens = [], []
        try:
            for batch in self._batches[task]:
                inputs = {key: value.to(device) for key, value in batch.items()}
                logits = model(**inputs).logits[:, :-1].float()
                targets = inputs["input_ids"][:, 1:]
                mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).double()
                kept = mask[:, 1:] * mask[:, :-1]  # what is read, and what is predicted, are both tokens of the text
                each = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
                losses.append((each.double() * kept).sum(1).cpu())
                tokens.append(kept.sum(1).cpu())
        finally:
            model.train(was_training)
        return likelihood_score(torch.cat(losses), torch.cat(tokens), task)

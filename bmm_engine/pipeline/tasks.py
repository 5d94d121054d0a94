"""The tasks of a recipe: each expert's labelled data and head, texts for language models, the harness's tasks, or a function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmm_engine.errors import ConfigError, shown
from bmm_engine.evaluators.build import build_evaluator
from bmm_engine.evaluators.contract import Evaluator, TaskData
from bmm_engine.evaluators.heads import with_head
from bmm_engine.evaluators.scores import Score
from bmm_engine.merging.plan import MergePlan
from bmm_engine.merging.sources import Models
from bmm_engine.pipeline.live import LiveModels, share_parameters
from bmm_engine.pipeline.models import live_model, model_folder, preparing_folder
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.sections import EvaluationRecipe

# These read each expert's own head; the others run the base's architecture as it is.
OWN_HEADS = ("text_classification", "image_classification", "function")


def evaluation_of(recipe: Recipe) -> EvaluationRecipe:
    """How a recipe's merges are scored. Raises `ConfigError` where it does not say."""
    if recipe.evaluation is None:
        raise ConfigError(
            "the recipe has no `evaluation`, so a merge cannot be scored. Say how: for example `evaluation: {kind: text_classification}` and, for"
            " each expert, `validation: FILE`."
        )
    return recipe.evaluation


def task_names(recipe: Recipe) -> tuple[str, ...]:
    return tuple(evaluation_of(recipe).tasks) or tuple(e.label for e in recipe.experts)


def check_tasks(recipe: Recipe) -> None:
    """Raise `ConfigError` for what can be told of a recipe's tasks from the recipe alone."""
    options = evaluation_of(recipe)
    labels = [e.label for e in recipe.experts]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"two experts are called {shown(label)}; give each a `name`, by which its task goes too.")
    if options.kind not in ("lm_eval", "function"):
        for expert in recipe.experts:
            if expert.validation is None:
                raise ConfigError(
                    f"expert {shown(expert.label)} has no `validation`, the data of its task that a merge is scored by; give every expert its file."
                )


@dataclass
class RecipeTasks:
    """The `Tasks` of a recipe with an `evaluation`."""

    recipe: Recipe
    models: Models

    @property
    def options(self) -> EvaluationRecipe:
        return evaluation_of(self.recipe)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return task_names(self.recipe)

    def live(self, plan: MergePlan, device: str) -> LiveModels:
        if self._own_heads:
            makers = [(e.label, i, lambda i=i: self._expert(i, device)) for i, e in enumerate(self.recipe.experts)]
            return share_parameters(plan.alignment, makers)
        shared = share_parameters(plan.alignment, [("", None, lambda: self._plain(device))])
        return replace(shared, models=dict.fromkeys(self.names, shared.models[""]))

    def evaluator(self, split: str) -> Evaluator | None:
        """None if no expert has data for the split. Raises `ConfigError` if only some have."""
        if self.options.kind in ("lm_eval", "function"):
            if split != "validation":
                return None
        else:
            lacking = [e.label for e in self.recipe.experts if getattr(e, split) is None]
            if len(lacking) == len(self.recipe.experts):
                return None
            if lacking:
                raise ConfigError(
                    f"expert {shown(lacking[0])} has no `{split}` file, others have one; give it to all experts, or to none."
                )
        return build_evaluator(self.options, [self._data(i, split) for i in range(len(self.recipe.experts))], split)

    def expert_scores(self, expert: int, evaluator: Evaluator, device: str) -> dict[str, Score]:
        own = self.recipe.experts[expert]
        model = self._expert(expert, device)
        tasks = self.names if self.options.tasks else (own.label,)
        return {task: evaluator(model, task) for task in tasks}

    @property
    def _own_heads(self) -> bool:
        return self.options.kind in OWN_HEADS and not self.options.tasks

    def _data(self, index: int, split: str) -> TaskData:
        expert, source = self.recipe.experts[index], self.models.experts[index]
        path = getattr(expert, split)
        return TaskData(
            name=expert.label,
            path=None if path is None else Path(path),
            model_path=model_folder(source),
            head=None if expert.head is None else Path(expert.head),
            metric=expert.metric or self.options.metric,
            prepared_by=preparing_folder(source, self.models.base, images=self.options.kind == "image_classification"),
        )

    def _expert(self, index: int, device: str) -> nn.Module:
        """The expert itself, with its head."""
        expert = self.recipe.experts[index]
        cls: Any = None
        if expert.head is not None:
            from transformers import AutoModel

            cls = AutoModel
        live, _ = live_model(
            self.models.experts[index],
            cls=cls,
            dtype=self.options.dtype,
            device=device,
            reports=expert.head is None,  # a bare encoder has no pooler, and needs none
        )
        if expert.head is not None:
            live = with_head(live, Path(expert.head), self.options.pooling).to(
                device, getattr(torch, self.options.dtype)
            )
        return live.eval()

    def _plain(self, device: str) -> nn.Module:
        return live_model(self.models.base, dtype=self.options.dtype, device=device)[0].eval()

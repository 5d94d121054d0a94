"""The evaluator that a recipe asks for."""

from __future__ import annotations

from collections.abc import Sequence

from bmm_engine.evaluators.classification import ClassificationEvaluator
from bmm_engine.evaluators.contract import Evaluator, TaskData
from bmm_engine.evaluators.function import FunctionEvaluator
from bmm_engine.evaluators.language_model import LanguageModelEvaluator
from bmm_engine.evaluators.lm_eval import LmEvalEvaluator
from bmm_engine.recipe.sections import EvaluationRecipe


def build_evaluator(options: EvaluationRecipe, tasks: Sequence[TaskData], split: str) -> Evaluator:
    """The evaluator that a recipe's `evaluation` asks for, with the data of `split` prepared. Raises what its constructor raises."""
    if options.kind in ("text_classification", "image_classification"):
        return ClassificationEvaluator(tasks, options, split)
    if options.kind == "language_model":
        return LanguageModelEvaluator(tasks, options, split)
    if options.kind == "lm_eval":
        return LmEvalEvaluator(options, tasks[0].preparing, split)
    return FunctionEvaluator(options.function or "", options.tasks or [t.name for t in tasks], split)

"""Any callable as the judge."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bmm_engine.errors import ConfigError, DataError, shown
from bmm_engine.evaluators.scores import Score, plain_score


class FunctionEvaluator:
    """`function(model, task)` returns a number, higher is better, or a `Score`. A text "package.module:name" is imported.

    Raises `ConfigError` for what cannot be imported or called, `DataError` for a value that is no finite number.
    """

    def __init__(self, function: Callable[[nn.Module, str], Any] | str, tasks: Sequence[str], split: str):
        self.function = load_function(function, "evaluation.function") if isinstance(function, str) else function
        self.tasks, self.split = tuple(tasks), split

    def __call__(self, model: nn.Module, task: str) -> Score:
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                found = self.function(model, task)
        finally:
            model.train(was_training)
        if isinstance(found, Score) and math.isfinite(found.value):
            return found
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"task {shown(task)}: the evaluation returned {shown(found)}, not a finite number.")
        return plain_score(value, "function")


def load_function(name: str, key: str) -> Callable[..., Any]:
    """The callable that `package.module:name` names. Raises `ConfigError`, saying which recipe `key` it is."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key}: {shown(name)} cannot be imported ({error}). It is written package.module:name; is its folder on PYTHONPATH?"
        ) from error
    if not callable(found):
        raise ConfigError(f"{key}: {shown(name)} is of type {type(found).__name__}, and not a function.")
    return found

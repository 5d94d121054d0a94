"""Tasks of EleutherAI's lm-evaluation-harness, in process, on the live model."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bmm_engine.errors import ConfigError, DataError
from bmm_engine.evaluators.scores import Score, mean_score, plain_score
from bmm_engine.recipe.sections import EvaluationRecipe
from bmm_engine.statistics.calibration import load_tokenizer


class LmEvalEvaluator:
    """The main metric (the first that a task lists, of those where higher is better) of each of the harness's `tasks`.

    Raises `ConfigError` without the package, and for a task that has no such metric.
    """

    def __init__(self, options: EvaluationRecipe, tokenizer_path: Path, split: str):
        try:
            import lm_eval
            import lm_eval.tasks
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise ConfigError("evaluation by lm-eval needs the package: pip install 'bmm-engine[lm_eval]'") from error
        self._harness: Any = lm_eval
        self._wrapper: Any = HFLM
        self.tasks, self.split, self._options = tuple(options.tasks), split, options
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._manager = lm_eval.tasks.TaskManager(include_path=options.include_path)
        known, groups = set(self._manager.all_subtasks), set(self._manager.all_groups)
        for task in self.tasks:
            if task in groups and task not in known:
                raise ConfigError(
                    f"evaluation.tasks: {task!r} is a group of lm-eval's; name the tasks of it that count."
                )
            if task not in known:
                raise ConfigError(
                    f"evaluation.tasks: lm-eval has no task {task!r}; `lm-eval ls tasks` lists them, and `include_path` names a folder of your own."
                )

    def __call__(self, model: nn.Module, task: str) -> Score:
        was_training = model.training
        with _own_seeds():
            try:
                found = self._run(model, task)
            finally:
                model.train(was_training)
        metric, filtered = self._metric(found, task)
        raw = found["results"][task][f"{metric},{filtered}"]
        value = float(raw) if isinstance(raw, Real) else math.nan
        if not math.isfinite(value):
            raise DataError(f"task {task!r}: its {metric} is {raw}; a merge at these values overflows.")
        samples = [s for s in found["samples"][task] if s.get("filter", filtered) == filtered]
        values = np.array([s[metric] for s in samples if isinstance(s.get(metric), (Real, np.bool_))], dtype=float)
        if len(values) and np.isclose(values.mean(), value):
            return mean_score(values, metric)
        return plain_score(value, metric)  # a metric of the whole set has no values of samples to draw again

    def _run(self, model: nn.Module, task: str) -> Any:
        wrapped = self._wrapper(pretrained=model, tokenizer=self._tokenizer, batch_size=self._options.batch_size)
        return self._harness.simple_evaluate(
            model=wrapped,
            tasks=[task],
            task_manager=self._manager,
            limit=self._options.limit,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
        )

    def _metric(self, found: Any, task: str) -> tuple[str, str]:
        """The metric, and the first of the filters that the answers went through before it was taken ("none" without any)."""
        better = found["higher_is_better"][task]
        for metric, higher in better.items():
            filters = [key.split(",", 1)[1] for key in found["results"][task] if key.startswith(f"{metric},")]
            if higher and filters:
                return str(metric), filters[0]
        raise ConfigError(
            f"lm-eval's task {task!r} has no metric where higher is better (it has: {', '.join(better)}); choose another task."
        )


@contextmanager
def _own_seeds() -> Iterator[None]:
    """The harness seeds all global generators; whoever else draws from them shall not notice."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy_state)

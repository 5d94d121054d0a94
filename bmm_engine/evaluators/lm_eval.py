"""Tasks of EleutherAI's lm-evaluation-harness, in process, on the live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bmm_engine.calibration import load_tokenizer
from bmm_engine.errors import ConfigError, DataError
from bmm_engine.scores import Score, mean_score, plain_score
from bmm_engine.sections import EvaluationRecipe


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
        known = set(self._manager.all_tasks)
        for task in self.tasks:
            if task not in known:
                raise ConfigError(
                    f"evaluation.tasks: lm-eval has no task {task!r}; `lm-eval ls tasks` lists them, and `include_path` names a folder of your own."
                )

    def __call__(self, model: nn.Module, task: str) -> Score:
        wrapped = self._wrapper(pretrained=model, tokenizer=self._tokenizer, batch_size=self._options.batch_size)
        found = self._harness.simple_evaluate(
            model=wrapped,
            tasks=[task],
            task_manager=self._manager,
            limit=self._options.limit,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
        )
        metric = self._metric(found, task)
        value = found["results"][task][f"{metric},none"]
        if not np.isfinite(value):
            raise DataError(f"task {task!r}: its {metric} is {value}; a merge at these values overflows.")
        values = np.array([sample[metric] for sample in found["samples"][task] if metric in sample], dtype=float)
        if len(values) and np.isclose(values.mean(), value):
            return mean_score(values, metric)
        return plain_score(value, metric)  # a metric of the whole set has no values of samples to draw again

    def _metric(self, found: Any, task: str) -> str:
        better = found["higher_is_better"][task]
        for metric, higher in better.items():
            if higher and f"{metric},none" in found["results"][task]:
                return str(metric)
        raise ConfigError(
            f"lm-eval's task {task!r} has no metric where higher is better (it has: {', '.join(better)}); choose another task."
        )

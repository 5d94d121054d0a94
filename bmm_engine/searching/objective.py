"""What a search maximises: one number out of the scores of all tasks, each relative to its expert's."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bmm_engine.errors import ConfigError, shown
from bmm_engine.evaluators.function import load_function
from bmm_engine.evaluators.scores import Score

Function = Callable[[Mapping[str, float]], float]


@dataclass(frozen=True)
class Objective:
    """`function` of task -> score / expert's score, higher is better; `name` as the recipe gives it."""

    name: str
    function: Function

    def __call__(self, normalized: Mapping[str, float]) -> float:
        """Raises `ConfigError` if a function of the user's does not return a finite number."""
        value = self.function(normalized)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(
                f"search.objective {self.name!r} returned {shown(value)}; it must return a finite number."
            )
        return float(value)


def mean(normalized: Mapping[str, float]) -> float:
    return sum(normalized.values()) / len(normalized)


def worst(normalized: Mapping[str, float]) -> float:
    return min(normalized.values())


def conditional_value_at_risk(share: float) -> Function:
    """The mean of the worst `share` of the tasks; the last of them counts by the part of it that is within the share."""

    def objective(normalized: Mapping[str, float]) -> float:
        left, total = share * len(normalized), 0.0
        for value in sorted(normalized.values()):
            part = min(1.0, left)
            total += part * value
            left -= part
            if left <= 0:
                break
        return total / (share * len(normalized))

    return objective


def get_objective(name: str | Function) -> Objective:
    """`mean`, `worst`, `cvar@q` with q in (0, 1], `package.module:function`, or a callable. Raises `ConfigError`."""
    if callable(name):
        return Objective(
            f"{getattr(name, '__module__', '')}:{getattr(name, '__qualname__', type(name).__name__)}", name
        )
    if name in ("mean", "worst"):
        return Objective(name, {"mean": mean, "worst": worst}[name])
    if name.startswith("cvar@"):
        try:
            share = float(name[len("cvar@") :])
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            raise ConfigError(f"search.objective {shown(name)}: the share must be in (0, 1], for example cvar@0.25.")
        return Objective(name, conditional_value_at_risk(share))
    if ":" in name:
        return Objective(name, load_function(name, "search.objective"))
    close = difflib.get_close_matches(name, ("mean", "worst", "cvar@0.5"), 1)
    hint = f"did you mean {close[0]!r}?" if close else "use mean, worst, cvar@q, or package.module:function."
    raise ConfigError(f"search.objective: unknown objective {shown(name)}; {hint}")


def objective_name(name: str | Function) -> str:
    """What a study records of an objective."""
    return name if isinstance(name, str) else get_objective(name).name


def standard_error(objective: Objective, scores: Mapping[str, Score], experts: Mapping[str, float]) -> float:
    """How uncertain the objective is because the tasks' scores are, each of which is lowered by its standard error in turn; 0 where none is known."""
    values = normalized({task: score.value for task, score in scores.items()}, experts)
    errors = {task: score.standard_error / experts[task] for task, score in scores.items()}
    moves = [objective(values) - objective({**values, task: values[task] - e}) for task, e in errors.items() if e > 0]
    return math.hypot(*moves)


def normalized(scores: Mapping[str, float], experts: Mapping[str, float]) -> dict[str, float]:
    """Task -> score / expert's score. Raises `ConfigError` for an expert that scores 0 or less."""
    for task, score in experts.items():
        if not score > 0:
            raise ConfigError(
                f"task {shown(task)}: its own expert scores {score:g}, so nothing can be measured relative to it. Check its data and head."
            )
    return {task: scores[task] / experts[task] for task in scores}

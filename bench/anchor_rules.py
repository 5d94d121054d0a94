"""Merging rules as both programs of `bench.anchors` know them, and the formula that both are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import formulas
from bench.anchor_models import EXPERTS, Models
from bench.formulas import Formula

WEIGHTS = (0.1, 0.2, 0.3, 0.4)


@dataclass(frozen=True)
class Ours:
    """A recipe's anchor, and its formula; `over_model` makes that of a rule which reads the whole model first. Without either the rule is random."""

    anchor: Mapping[str, Any]
    formula: Formula | None = None
    over_model: Callable[[Models], Formula] | None = None

    def truth(self, models: Models) -> Formula | None:
        return self.over_model(models) if self.over_model else self.formula


@dataclass(frozen=True)
class Rule:
    """One rule as both programs know it: ours by its label in the table, and mergekit's method with its parameters, those of models in a list."""

    ours: Mapping[str, Ours]
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    of_models: Sequence[Mapping[str, Any]] = ({},) * EXPERTS
    with_base: bool = True


def _weighted(weights: Sequence[float], **parameters: Any) -> list[dict[str, Any]]:
    return [{"weight": weight, **parameters} for weight in weights]


ONES = (1.0,) * EXPERTS


RULES = {
    "linear": Rule(
        {"average": Ours({"name": "average", "weight": [*WEIGHTS]}, formulas.linear(WEIGHTS))},
        "linear",
        of_models=_weighted(WEIGHTS),
        with_base=False,
    ),
    "task_arithmetic": Rule(
        {
            "task_arithmetic": Ours(
                {"name": "task_arithmetic", "weight": [*WEIGHTS], "scaling": 1.0}, formulas.task_arithmetic(WEIGHTS)
            )
        },
        "task_arithmetic",
        of_models=_weighted(WEIGHTS),
    ),
    "ties": Rule(
        {
            "ties by tensor": Ours(
                {"name": "ties", "density": 0.2, "threshold": "tensor", "tie": "positive"}, formulas.ties(0.2)
            ),
            "ties over the model": Ours(
                {"name": "ties", "density": 0.2},
                over_model=lambda models: formulas.ties(0.2, models.kept_from(0.2)),
            ),
        },
        "ties",
        of_models=_weighted(ONES, density=0.2),
    ),
    "della": Rule(
        {"della": Ours({"name": "della", "density": 0.5, "epsilon": 0.15, "rescale": "l1"})},
        "della",
        of_models=_weighted(ONES, density=0.5, epsilon=0.15),
    ),
    "dare_ties": Rule(
        {
            "dare_ties": Ours(
                {"name": "dare_ties", "density": 0.5, "trim": 1.0, "rescale": "l1", "tie": "positive"}
                | {"weight": [*WEIGHTS], "normalize": False},
            )
        },
        "dare_ties",
        of_models=_weighted(WEIGHTS, density=0.5),
    ),
    "breadcrumbs": Rule(
        {
            "breadcrumbs": Ours(
                {"name": "breadcrumbs", "density": 0.9, "gamma": 0.01, "weight": [*WEIGHTS], "scaling": 1.0},
                formulas.breadcrumbs(0.9, 0.01, WEIGHTS),
            )
        },
        "breadcrumbs",
        of_models=_weighted(WEIGHTS, density=0.9, gamma=0.01),
    ),
    "slerp": Rule({"slerp": Ours({"name": "slerp", "t": 0.5}, formulas.slerp(0.5))}, "slerp", {"t": 0.5}, [{}]),
    "model_stock": Rule({"model_stock": Ours({"name": "model_stock"}, formulas.model_stock)}, "model_stock"),
    "sce": Rule({"sce": Ours({"name": "sce", "select_topk": 0.1}, formulas.sce(0.1))}, "sce", {"select_topk": 0.1}),
    "karcher": Rule({"karcher": Ours({"name": "karcher"}, formulas.karcher)}, "karcher", with_base=False),
}

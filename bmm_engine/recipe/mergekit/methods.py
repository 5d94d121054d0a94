"""mergekit's merge methods: by which rule each is carried out, and what its parameters are called there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """A parameter of a mergekit method: `ours` is what the rule calls it, `each` whether it has a value for each model."""

    ours: str
    default: Any = REQUIRED
    each: bool = False
    convert: Callable[[Any], Any] = field(default=float)


def _flag(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return bool(value)  # mergekit has all its values as numbers
    text = str(value).lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise ValueError("it must be true or false")


def _l1(value: Any) -> str:
    return "l1" if _flag(value) else "none"


@dataclass(frozen=True)
class Method:
    """How a merge method is carried out here: by which rule, with which of its options fixed.

    `base`: whether the base model is apart from those merged ("required"), may be ("optional", then `with_base` and `without_base` are
    fixed accordingly), or is one of them ("ignored").
    """

    rule: str
    base: Literal["required", "optional", "ignored"]
    parameters: Mapping[str, Parameter]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    with_base: Mapping[str, Any] = field(default_factory=dict)
    without_base: Mapping[str, Any] = field(default_factory=dict)


_WEIGHT = Parameter("weight", each=True)
_ORIGIN: dict[str, Any] = {"with_base": {"origin": "base"}, "without_base": {"origin": "zero"}}


def switch(ours: str, default: bool) -> Parameter:
    return Parameter(ours, default, convert=_flag)


def _arithmetic(*, normalize: bool, rescale: bool | None = None, **more: float) -> dict[str, Parameter]:
    """The parameters of mergekit's family of task arithmetic; `rescale` is None for those that prune nothing."""
    parameters = {"weight": _WEIGHT, "lambda": Parameter("scaling", 1.0), "normalize": switch("normalize", normalize)}
    if rescale is not None:
        parameters["density"] = Parameter("density", 1.0, each=True)
        parameters["rescale"] = Parameter("rescale", rescale, convert=_l1)
    return parameters | {name: Parameter(name, default, each=True) for name, default in more.items()}


METHODS: dict[str, Method] = {
    "linear": Method("average", "ignored", {"weight": _WEIGHT, "normalize": switch("normalize", True)}),
    "task_arithmetic": Method("task_arithmetic", "required", _arithmetic(normalize=False)),
    "ties": Method(
        "ties", "required", _arithmetic(normalize=True, rescale=False), {"threshold": "tensor", "tie": "positive"}
    ),
    "dare_linear": Method("dare_linear", "required", _arithmetic(normalize=False, rescale=True)),
    "dare_ties": Method(
        "dare_ties", "required", _arithmetic(normalize=False, rescale=True), {"trim": 1.0, "tie": "positive"}
    ),
    "breadcrumbs": Method("breadcrumbs", "required", _arithmetic(normalize=False, rescale=False, gamma=0.01)),
    "breadcrumbs_ties": Method("breadcrumbs_ties", "required", _arithmetic(normalize=False, rescale=False, gamma=0.01)),
    "della": Method("della", "required", _arithmetic(normalize=True, rescale=True, epsilon=0.15)),
    "della_linear": Method("della_linear", "required", _arithmetic(normalize=False, rescale=True, epsilon=0.15)),
    "sce": Method("sce", "required", {"select_topk": Parameter("select_topk", 1.0)}, {"epsilon": 1e-6}),
    "slerp": Method("slerp", "required", {"t": Parameter("t")}),
    "nuslerp": Method("nuslerp", "optional", {"weight": _WEIGHT}, **_ORIGIN),
    "multislerp": Method(
        "multislerp", "optional", {"weight": _WEIGHT, "normalize_weights": switch("normalize", True)}, **_ORIGIN
    ),
    "karcher": Method(
        "karcher", "ignored", {"max_iter": Parameter("steps", 10, convert=int), "tol": Parameter("tolerance", 1e-5)}
    ),
    "model_stock": Method("model_stock", "required", {"filter_wise": switch("filter_wise", False)}),
    "nearswap": Method("nearswap", "required", {"t": Parameter("t")}),
    "arcee_fusion": Method("arcee_fusion", "required", {}),
    "ram": Method("ram", "required", {"epsilon": Parameter("epsilon", 1e-5)}),
    "ramplus_tl": Method(
        "ram_plus",
        "required",
        {"r": Parameter("r", 0.1), "alpha": Parameter("alpha", 0.2), "epsilon": Parameter("epsilon", 1e-5)},
        {"extent": "tensor"},
    ),
    "passthrough": Method("passthrough", "ignored", {"scale": Parameter("scale", 1.0, each=True)}),
}
# Two parameters of nuslerp become one here.
VECTORS = {"nuslerp_flatten": True, "nuslerp_row_wise": False}
KNOWN = sorted({name for method in METHODS.values() for name in method.parameters} | {"int8_mask", "eps", *VECTORS})

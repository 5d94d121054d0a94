"""How to merge: the options of the algebra, once for recipes and for keywords.

A new option is one field here, with its check and its description, and the places that use it: the recipe has it as a key, `merge`,
`merge_sequential` and `search` as a keyword, the record of a merge and the identity of an unfinished one as a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_serializer,
    field_validator,
)

from bmm_engine.anchors import Anchor, Setting, get_anchor
from bmm_engine.anchors.contract import GRAMS, Needs
from bmm_engine.checkpoint import parse_size
from bmm_engine.checkpoint.dtypes import parse_dtype
from bmm_engine.errors import ConfigError
from bmm_engine.executors.devices import device_fault
from bmm_engine.recipe.explain import explain
from bmm_engine.recipe.sections import SequentialRecipe, Strict
from bmm_engine.solving.filters import Filter, directions_fault


def _over_the_model(key: str, check: Callable[[float], str]) -> Callable[[Any], Any]:
    """Validates a number, or one that varies over the model (the forms of `anchors/settings.py`)."""

    def number(value: Any) -> float:
        if isinstance(value, bool):
            raise ValueError("it must be a number")
        try:
            found = float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("it must be a number") from None
        if complaint := check(found):
            raise ValueError(complaint)
        return found

    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v if k == "filter" else numbers(v) for k, v in value.items()}
        return [numbers(v) for v in value] if isinstance(value, (list, tuple)) else number(value)

    def validate(value: Any) -> Any:
        if not isinstance(value, (list, tuple, dict)):
            return number(value)
        Setting(value, where=key, check=number, default=0.0)  # raises for what is no value
        return numbers(value)

    return validate


def _task_weights(value: Any) -> str | tuple[float, ...] | None:
    if value is None or (isinstance(value, str) and value in ("none", "energy", "frobenius")):
        return value
    try:
        if isinstance(value, (str, Mapping)):
            raise TypeError
        weights = tuple(float(weight) for weight in value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("it must be 'none', 'energy', 'frobenius' or one number per expert") from None
    if not all(0 <= weight < math.inf for weight in weights) or (weights and not any(weights)):
        raise ValueError("task weights must be finite, >= 0 and not all 0")
    return weights


def _directions(value: Any) -> Any:
    if fault := directions_fault(value):
        raise ValueError(f"it {fault}")
    return value


def _device(value: Any) -> Any:
    """The name of a device that there may be; whether there is one is checked where work starts."""
    name = str(value) if isinstance(value, torch.device) else value
    if isinstance(name, str) and (fault := device_fault(name)):
        raise ValueError(fault)
    return name


def _patterns(value: Any) -> Any:
    """One pattern is a list of one."""
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, Iterable) and not isinstance(value, Mapping) else value


Varying = float | list[Any] | dict[str, Any]
Ridge = Annotated[
    Varying,
    PlainValidator(_over_the_model("alpha", lambda v: "" if v >= 0 else "it must be >= 0 (inf for the anchor itself)")),
]
Scale = Annotated[
    Varying, PlainValidator(_over_the_model("scale", lambda v: "" if math.isfinite(v) else "it must be finite"))
]
Directions = Annotated[int | float | str | None, PlainValidator(_directions)]
TaskWeights = Annotated[Literal["none", "energy", "frobenius"] | tuple[float, ...], PlainValidator(_task_weights)]
Patterns = Annotated[list[str], BeforeValidator(_patterns)]
Device = Annotated[str, BeforeValidator(_device)]
Host = Annotated[int, Field(strict=True, ge=0)] | str


class Checked(BaseModel):
    """Raises `ConfigError` in the place of pydantic's: which key, its value, what is wrong, the nearest known one."""

    def __init__(self, **options: Any):
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise ConfigError(explain(error, lambda loc: SequentialOptions if len(loc) > 1 else type(self))) from error


class Algebra(Strict):
    """What decides a merge beside its models and what was measured on them; keys of a recipe, and keywords."""

    gram_source: Literal["data", "task_vectors", "hybrid"] | None = Field(
        None,
        description="null: task_vectors without Grams or calibration; data if sequential, with fit_bias, or with alpha inf; else hybrid",
    )
    hybrid_share: float = Field(0.5, ge=0, le=1, description="share of the task vector's Gram in a hybrid one")
    normalization: Literal["trace", "none"] = Field(
        "trace", description="of task vectors' Grams: trace 1, or as they are"
    )
    alpha: Ridge = Field(0.03, description="ridge relative to the mean diagonal of the Gram; inf is the anchor itself")
    filter: Literal["ridge", "exponential", "truncated"] = Field(
        "ridge",
        description="how far the solve follows each direction of the inputs: e/(e + lam), 1 - exp(-e/lam), or e > lam",
    )
    directions: Directions = Field(
        None,
        description="of the inputs, that are followed at all: how many, a share, 'participation' or 'gavish_donoho'; null: all",
    )
    calibrate: Literal["svc", "subspace_boost", "larv"] | None = Field(
        None, description="what follows the anchor's rule, or for larv goes before it, on linear modules; null: nothing"
    )
    prior: float = Field(
        1.0,
        allow_inf_nan=False,
        description="what the ridge pulls towards, W_0 + prior (W_a - W_0): the anchor at 1, beyond it above; what is the anchor's alone stays",
    )
    scale: Scale = Field(1.0, description="assembly W_0 + scale (W* - W_0)")
    task_weights: TaskWeights | None = Field(
        None,
        description="none, energy, frobenius (1 / ||G_t||), or a number for each expert; null: none, or energy in the mode sequential",
    )
    sensitivity_share: float = Field(
        0.75,
        ge=0,
        lt=1,
        description="share of sensitivities in the metric of a module's outputs; the rest weighs all outputs equally",
    )
    shrinkage: float | None = Field(
        None,
        ge=0,
        le=1,
        description="where experts do not agree, scale (1 - shrinkage (1 - r)), plain merges only; null: 0.2 in a recipe without data, else 0",
    )
    output_samples: float = Field(
        8.0,
        ge=0,
        le=1e12,
        allow_inf_nan=False,
        description="as how many samples a task vector's U U^T counts beside sensitivities measured on n; 0: the measured ones alone",
    )
    fit_bias: bool | None = Field(None, description="solve biases with the weights; null: in the mode sequential only")
    modules: Patterns | None = Field(
        None, description="shell patterns of the linear modules to solve; null: all but heads"
    )
    keep_base: Patterns = Field([], description="shell patterns of tensors to copy from the base")
    host: Host | None = Field(
        None,
        description="expert, by name or by place from 0, whose checkpoint the output is, with all that only it has; null: none, or the first where"
        " the anchor's rule has a host",
    )
    vocabulary: Literal["error", "crop", "pad"] = Field(
        "error", description="where embeddings differ in rows: an error, cropped to the fewest, or padded to the most"
    )
    unchecked_statistics: bool = Field(
        False,
        description="take measured files as they are: without fingerprints of the weights they were measured on, or of unequal modules",
    )
    unchecked_configs: bool = Field(
        False,
        description="merge although configs do not fit: an expert's makes another function of the weights, or the base's builds other tensors",
    )
    device: Device = Field("cpu", description="cpu or cuda[:N]")


def defaults_of(mode: str) -> dict[str, Any]:
    """What the options are that a mode decides, where they are left open."""
    sequential = mode == "sequential"
    return {"task_weights": "energy" if sequential else "none", "fit_bias": sequential, "shrinkage": 0.0}


class SequentialOptions(SequentialRecipe, Checked):
    """How a sequential merge walks: a recipe's section, and what only keywords can say."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    hidden_dtype: Any = Field(None, description="how hidden states are kept; None: as the models run")
    remeasure: Any = Field(
        False,
        description="a function (tensors, t) -> SensitivitySet: after each sweep but the last, of the merged network (its tensors by the base's"
        " names) with the head and on the data of expert t, for the next sweep",
    )
    mask: Any = Field("attention_mask", description="of a batch's padding, as in collect_grams")
    walk_dtype: Any = Field(None, description="of the models that are run; None: a live base's own, else float32")

    @field_validator("hidden_dtype", "walk_dtype")
    @classmethod
    def _dtype(cls, value: Any) -> torch.dtype | None:
        return parse_dtype(value)

    @field_validator("remeasure")
    @classmethod
    def _remeasure(cls, value: Any) -> Any:
        if not (isinstance(value, bool) or callable(value)):
            raise ValueError("it must be a function (tensors, t) -> SensitivitySet")
        return value

    @field_serializer("remeasure")
    def _whether(self, value: Any) -> bool:
        """Records and identities say that it is done, not by which function."""
        return bool(value)

    def hybrid_share(self, samples: int) -> float:
        """Of the task vector's Gram, beside the measured one of so many samples."""
        return self.task_vector_samples / (self.task_vector_samples + samples)

    @property
    def hidden_bytes(self) -> int:
        """Of memory for hidden states."""
        return parse_size(self.hidden_memory) if self.hidden_memory else 0


class MergeSettings(Algebra, Checked):
    """The algebra of one merge, with nothing left open. Raises `ConfigError`: which option, its value, what is wrong, the nearest known one."""

    model_config = ConfigDict(frozen=True)

    mode: Literal["plain", "sequential"] = "plain"
    anchor: str = Field(
        "average", description="the prior, a merging rule by name; it also gives all that is no linear module"
    )
    anchor_parameters: dict[str, Any] = Field({}, description="of the anchor's rule; they may vary over the model")
    gram_source: Literal["data", "task_vectors", "hybrid"] = "task_vectors"
    task_weights: TaskWeights = "none"
    fit_bias: bool = False
    shrinkage: float = Field(0.0, ge=0, le=1)
    sequential: SequentialOptions = SequentialOptions()

    def __init__(self, **options: Any):
        chosen = defaults_of(options.get("mode", "plain"))
        given = {key: value for key, value in options.items() if value is not None or key not in chosen}
        super().__init__(**{**chosen, **given})
        if self.fit_bias and self.gram_source != "data" and self.mode == "plain":
            raise ConfigError(
                f"fit_bias needs the mean of the inputs, so gram_source 'data', not {self.gram_source!r}."
            )
        self.rule.parameters(self.anchor_parameters)

    def but(self, **changes: Any) -> MergeSettings:
        """The same with some options replaced, checked again."""
        return MergeSettings(**{**self.options(), **changes})

    def options(self) -> dict[str, Any]:
        """Every option by its name."""
        return {key: getattr(self, key) for key in type(self).model_fields}

    def anchor_alone(self, gram_source: str) -> MergeSettings:
        """Of the anchor's own merge, on what its rule may need of that source."""
        return self.but(
            mode="plain", alpha=math.inf, scale=1.0, task_weights="none", fit_bias=False, gram_source=gram_source
        )

    def plain(self) -> dict[str, Any]:
        """As keys of a recipe, beside its models and its anchor."""
        keys = ("mode", *Algebra.model_fields, *(("sequential",) if self.mode == "sequential" else ()))
        own = self.model_dump(include=set(keys) - {"device"})
        if "sequential" in own:
            own["sequential"] = {key: own["sequential"][key] for key in SequentialRecipe.model_fields}
        return plain_values({key: own[key] for key in keys if own.get(key) is not None})

    @property
    def rule(self) -> Anchor:
        return get_anchor(self.anchor)

    @cached_property
    def alpha_setting(self) -> Setting:
        return Setting(self.alpha, where="alpha", check=float, default=0.03)

    @cached_property
    def scale_setting(self) -> Setting:
        return Setting(self.scale, where="scale", check=float, default=1.0)

    @property
    def spectral_filter(self) -> Filter:
        return Filter(self.filter, self.directions)

    def check_posterior(self) -> None:
        """Raise `ConfigError` unless there is a posterior to draw from."""
        if not self.spectral_filter.plain:
            raise ConfigError(
                f"draws from the posterior are for the plain ridge, whose prior it has: filter is {self.filter!r} and directions {self.directions!r};"
                " leave both out."
            )

    def output_hybrid(self, samples: int) -> float:
        """The share of the task vector beside sensitivities measured on so many samples; none where that is not known."""
        return self.output_samples / (self.output_samples + samples) if samples else 0.0

    @property
    def solves(self) -> bool:
        """False where every module comes from the anchor: `alpha` is inf."""
        return self.alpha != math.inf

    @cached_property
    def anchor_needs(self) -> Needs:
        """What the anchor's rule reads beside the weights, with its parameters."""
        return self.rule.needs_of(self.anchor_parameters)

    @property
    def needs_grams(self) -> bool:
        return self.solves or bool(self.anchor_needs & GRAMS)


def plain_values(value: Any) -> Any:
    """As JSON holds it: infinity as text, which a recipe understands too, dtypes by name, lists for tuples."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "inf" if value == math.inf else value

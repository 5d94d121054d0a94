"""Sections of a recipe that say how models are run and judged: calibration, sequential, evaluation, search."""

from __future__ import annotations

import math
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from bmm_engine.checkpoint import parse_size


class Strict(BaseModel):
    """Unknown keys are errors, and a switch is no number and no text: `trials: true` is not 1, `fit_bias: 0` and `fit_bias: 'no'` are not false."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _switch_or_not(cls, value: Any, info: ValidationInfo) -> Any:
        if type(value) not in (bool, int, float, str):
            return value
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and not kinds & {bool, Any}:
            raise ValueError("it must not be true or false")
        if not isinstance(value, bool) and kinds <= {bool, type(None)}:
            raise ValueError("it must be true or false")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of; values of a `Literal` count as their types."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {annotation}


class CalibrationRecipe(Strict):
    """How calibration files are read."""

    samples: int = Field(256, ge=1, description="samples per expert")
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(128, ge=1, description="tokens per text")
    field: str = "text"
    target_field: str | None = Field(
        None, description="of an encoder with a decoder: the column of what it is to make of the texts; null: the texts"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    fisher_labels: Literal["expected", "sampled", "data"] = Field(
        "expected",
        description="labels for Fisher information: the exact expectation, drawn from the model (language models), or the data's own",
    )


class SequentialRecipe(Strict):
    """How a merge in the mode "sequential" walks through the network; the models run in the dtype of `calibration`."""

    blocks: str | None = Field(
        None, description="the list of blocks, by name or shell pattern; null: all lists that hidden states go through"
    )
    target: Literal["stream", "module"] = Field(
        "stream",
        description="what a module that writes to the residual stream aims at: what the expert's stream holds after it, so that it makes up for what"
        " the stream has drifted before, or what the expert's module gives",
    )
    drift: float = Field(
        1.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of the drift that is corrected, of inputs and of the residual stream: 1 aims at what the expert gives on its own inputs,"
        " 0 at what its weights give on the merged network's (RegMean++)",
    )
    mean_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="how much more a task's mean error counts in linear modules, which does not average out over its rows",
    )
    task_vector_samples: float = Field(
        100.0,
        ge=0,
        le=1e12,
        allow_inf_nan=False,
        description="as how many calibration samples the task vector's Gram counts beside a task's own; 0: the measured Grams alone",
    )
    token_rows: Literal["all", "cls", "last"] = Field(
        "all",
        description="rows that count in full in linear modules of the last blocks, but for keys and values: all, or of each sample the first or the"
        " last token that is no padding",
    )
    token_weight: float = Field(0.01, ge=0, le=1, description="what the other rows count there, if not all do in full")
    token_blocks: int = Field(1, ge=1, description="how many blocks those are, at the end of the last chain")
    norms: Literal["anchor", "fit"] = Field(
        "anchor",
        description="gains (and biases) of normalisations: the anchor's, or solved too, feature by feature, every error of a task alike: neither"
        " mean_weight nor sensitivities reach them",
    )
    sweeps: int = Field(1, ge=1, le=1000, description="walks, each with the result of the one before as its anchor")
    remeasure: bool = Field(
        False,
        description="after each sweep but the last, measure sensitivities again, at the merged network with each task's head, for the next one",
    )
    hidden_memory: str | int = Field("4GB", description="hidden states kept in memory, in all; the rest in files")
    hidden_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="how hidden states are kept; null: as the models run"
    )

    @field_validator("hidden_memory")
    @classmethod
    def _size(cls, value: str | int) -> str | int:
        if value:
            parse_size(value)
        return value

    @model_validator(mode="after")
    def _several(self) -> SequentialRecipe:
        if self.remeasure and self.sweeps < 2:
            raise ValueError(f"remeasure is for sweeps after the first, and sweeps is {self.sweeps}; say 2 or more")
        return self


class EvaluationRecipe(Strict):
    """How a live model is scored on a task.

    `kind`: "text_classification" and "image_classification" read each expert's `validation` (and `test`) file and its own head; "language_model"
    reads texts; "lm_eval" runs the harness's `tasks`; "function" calls `function` ("package.module:name") as `function(model, task) -> float`.
    """

    kind: Literal["text_classification", "image_classification", "language_model", "lm_eval", "function"]
    metric: Literal["accuracy", "macro_f1"] = Field(
        "accuracy", description="of classification; an expert may name its own"
    )
    field: str = Field("text", description="the column of texts")
    label_field: str = Field("label", description="the column of labels")
    pooling: Literal["mean", "cls"] = Field("mean", description="what a `head` of its own reads of a bare encoder")
    batch_size: int = Field(32, ge=1)
    max_length: int = Field(128, ge=1, description="tokens per text")
    samples: int | None = Field(None, ge=1, description="at most so many samples a task, spread evenly over the file")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tasks: list[str] = Field(
        [], description="names of lm-eval's tasks, or what to call `function` with; default: the experts"
    )
    limit: int | None = Field(None, ge=1, description="of lm-eval: samples a task")
    include_path: str | None = Field(None, description="of lm-eval: a folder of task files of one's own")
    function: str | None = None

    @model_validator(mode="after")
    def _check(self) -> EvaluationRecipe:
        if (self.kind == "function") != (self.function is not None):
            raise ValueError("`function` (package.module:name) goes with kind 'function', and only with it")
        if self.tasks and self.kind not in ("lm_eval", "function"):
            raise ValueError(
                f"`tasks` goes with the kinds lm_eval and function; of kind {self.kind!r} the tasks are the experts'"
            )
        if self.kind == "lm_eval" and not self.tasks:
            raise ValueError("kind 'lm_eval' needs `tasks`, the names of the harness's tasks")
        return self


class SearchRecipe(Strict):
    """The outer level: what is varied, by which optimiser, for how long.

    `groups`: modules that share a ridge: "role_depth" (attention in and out, MLP in and out, times `depth_bins` bins of the layers), "role", "depth",
    "all" (one group), "module" (one for each), or {name: [shell patterns]}. `alpha_range`: the upper end stands for the anchor itself.
    `scales`: "fixed" (the recipe's), "global" (one for all), or "group". `anchors`: names (or mappings with parameters) to choose from; none: the
    recipe's. `weightings`: task weights to choose from ("none", "energy", "frobenius"), or "free": one weight for each task, which makes a trial
    factor anew.
    `lead`: the best of many trials looks better than it is; it is chosen if its objective is higher than the best anchor's or default's by so many
    of its standard errors, as the validation data's size makes them (known of classification and of texts); else that anchor or default is.
    """

    trials: int | None = Field(60, ge=1)
    minutes: float | None = Field(None, gt=0, description="stop asking after so long; trials: null for no other limit")
    seed: int = Field(0, ge=0, lt=2**32)
    optimizer: str = Field("BO", description="any optimiser that Nevergrad registers")
    objective: str = Field("mean", description="mean, worst, cvar@q (q in (0, 1]), or package.module:function")
    groups: Literal["role_depth", "role", "depth", "all", "module"] | dict[str, list[str]] = "role_depth"
    depth_bins: int = Field(3, ge=1)
    alpha_range: tuple[float, float] = (1e-4, 1e4)
    scales: Literal["fixed", "global", "group"] = "global"
    scale_range: tuple[float, float] = (0.5, 1.5)
    anchors: list[Any] = []
    weightings: list[Literal["none", "energy", "frobenius"]] | Literal["free"] = Field(
        [], description="empty: the recipe's own"
    )
    schedule: Literal["asynchronous", "synchronous"] = Field(
        "asynchronous", description="synchronous: ask as many as there are workers, wait for all, tell them in order"
    )
    lead: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="standard errors by which a candidate must lead over the best first one; 0: any",
    )
    racing: bool = Field(False, description="stop a trial whose remaining tasks cannot lift it over the best")
    racing_margin: float = Field(0.02, ge=0, description="how much better than ever seen a remaining task might be")

    @field_validator("alpha_range", "scale_range")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not (math.isfinite(low) and math.isfinite(high) and 0 < low < high):
            raise ValueError("it must be two positive numbers, the smaller first")
        return value

    @model_validator(mode="after")
    def _limited(self) -> SearchRecipe:
        if self.trials is None and self.minutes is None:
            raise ValueError("give `trials`, `minutes`, or both; a search without an end has no result")
        return self

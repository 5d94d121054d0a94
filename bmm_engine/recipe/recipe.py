"""The YAML recipe of a merge, as validated types. Unknown keys are errors with a suggestion."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator, model_validator

from bmm_engine.anchors import get_anchor
from bmm_engine.checkpoint import parse_size
from bmm_engine.errors import ConfigError, shown
from bmm_engine.recipe import mergekit
from bmm_engine.recipe.expert_parameters import with_own_parameters
from bmm_engine.recipe.explain import explain, parse_section
from bmm_engine.recipe.places import Places
from bmm_engine.recipe.references import (
    AnchorRecipe,
    ExpertRecipe,
    ModelRecipe,
    ModelReference,
    SliceRecipe,
    StackRecipe,
)
from bmm_engine.recipe.sections import CalibrationRecipe, EvaluationRecipe, SearchRecipe, SequentialRecipe, Strict
from bmm_engine.recipe.settings import Algebra, MergeSettings, SequentialOptions, defaults_of, plain_values
from bmm_engine.recipe.yaml_file import load_yaml
from bmm_engine.solving.filters import Filter
from bmm_engine.solving.weighted import check_filter
from bmm_engine.statistics.text_file import check_path


class Named(Strict):
    """What is merged, and by which mode and anchor."""

    base: ModelReference
    experts: list[ExpertRecipe] = Field(min_length=1)
    mode: Literal["plain", "sequential"] | None = Field(
        None, description="null: sequential where every expert has calibration and none has grams, else plain"
    )
    anchor: AnchorRecipe = AnchorRecipe(name="average")


@dataclasses.dataclass
class Chosen:
    """Keys that a recipe left open, and that were chosen for it. Recipes that come to the same are equal."""

    keys: set[str] = dataclasses.field(default_factory=set, compare=False)


class Recipe(Algebra, Named):
    """Everything that decides a merge; paths are relative to the recipe's file.

    `mode`: "plain" solves every module on the experts' own inputs; "sequential" walks through the network and solves it on what the merged
    modules before it give (see `merge_sequential`), by default with biases and energy weights; it is the default where every expert has
    `calibration`, and none `grams`. `output_weights`: "sensitivity" weighs errors of a module's outputs by how much each expert's predictions
    depend on them, measured on its calibration data (its checkpoint, or its `head`, must give logits) unless its `sensitivity` file exists; it
    is the default where every expert is a classifier. "task_vectors" weighs them without data, by `U_t U_t^T`: the default of a data-free merge.
    `same_tokenizer`: refuse models whose tokenizer has another vocabulary than the base's. `chat_template`: of the output; `auto` is the one that
    most of the models have.
    """

    output_weights: Literal["none", "sensitivity", "task_vectors"] | None = Field(
        None,
        description="null: sensitivity where every expert is a classifier and can be run, task_vectors without data, else none",
    )
    same_tokenizer: bool = False
    chat_template: str | None = Field(
        None, description="null: the base's; auto: the one that most of the models have; else the text of a template"
    )
    calibration: CalibrationRecipe = CalibrationRecipe()
    sequential: SequentialRecipe = SequentialRecipe()
    evaluation: EvaluationRecipe | None = None
    search: SearchRecipe = SearchRecipe()
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    max_shard_size: str | int = "5GB"
    # Folders that measured files may be written into: the recipe's own, the working folder, and those that its user named.
    _writable: Places = PrivateAttr(default_factory=Places.here)
    _chosen: Chosen = PrivateAttr(default_factory=Chosen)

    @field_validator("experts", mode="before")
    @classmethod
    def _plain_paths(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [
            {"model": item} if isinstance(item, str) or (isinstance(item, dict) and set(item) == {"slices"}) else item
            for item in value
        ]

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: str | int) -> str | int:
        parse_size(value)
        return value

    @field_validator("chat_template")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None and value != "auto" and "{" not in value:
            raise ValueError(
                f"{shown(value)} is no template: write auto, or the text of one, which holds {{{{ ... }}}} or {{% ... %}}"
            )
        return value

    @field_validator("anchor", mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        names = [e.name for e in self.experts if e.name]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two experts are called {shown(twice)}; give each a `name` of its own, or none")
        return self

    @model_validator(mode="after")
    def _choose_mode(self) -> Recipe:
        self._chosen = Chosen({key for key in ("mode", "gram_source") if getattr(self, key) is None})
        if self.mode is None:
            runs = all(e.calibration and not e.grams and not isinstance(e.model, StackRecipe) for e in self.experts)
            solves = self.alpha != math.inf and self.gram_source is None
            self.mode = "sequential" if runs and solves else "plain"
        for key, value in defaults_of(self.mode).items():
            if getattr(self, key) is None:
                self._chosen.keys.add(key)
                setattr(self, key, value)
        if self.mode != "sequential":
            return self
        lacking = [e.label for e in self.experts if e.calibration is None]
        if lacking:
            raise ValueError(
                f"mode 'sequential' runs every expert on its own data; expert {shown(lacking[0])} has no `calibration`"
            )
        if self.gram_source not in (None, "data"):
            raise ValueError(
                f"mode 'sequential' measures what it solves on; gram_source {self.gram_source!r} does not go with it"
            )
        return self

    @model_validator(mode="after")
    def _choose_gram_source(self) -> Recipe:
        measured = [e.grams is not None or e.calibration is not None for e in self.experts]
        if self.gram_source is None:
            if any(measured) and not all(measured):
                lacking = self.experts[measured.index(False)].label
                raise ValueError(
                    f"expert {shown(lacking)} has neither `grams` nor `calibration`, others have; give all of them one, or none"
                )
            only_data = self.mode == "sequential" or self.fit_bias or self.alpha == math.inf
            self.gram_source = "task_vectors" if not all(measured) else "data" if only_data else "hybrid"
        elif self.gram_source != "task_vectors" and not all(measured) and self.alpha != math.inf:
            lacking = self.experts[measured.index(False)].label
            raise ValueError(
                f"gram_source {self.gram_source!r} needs `grams` or `calibration` for every expert; {shown(lacking)} has none"
            )
        for expert in self.experts:
            if expert.calibration is not None and isinstance(expert.model, StackRecipe):
                raise ValueError(
                    f"expert {shown(expert.label)}: `calibration` runs the model, so it needs a checkpoint of its own; name its Grams with `grams`"
                )
        return self

    @model_validator(mode="after")
    def _check_anchor(self) -> Recipe:
        rule = get_anchor(self.anchor.name)
        rule.check_experts(len(self.experts))
        parameters = rule.parameters(self.anchor_parameters)
        parameters.at("", 0.0, len(self.experts))
        needs = rule.needs_of(parameters)
        for need, key in (("fishers", "fisher"), ("sensitivities", "sensitivity")):
            lacking = [e.label for e in self.experts if getattr(e, key) is None and e.calibration is None]
            if lacking and need in needs:
                raise ConfigError(
                    f"expert {shown(lacking[0])} has no `{key}`, which anchor {rule.name!r} needs; give every expert its file, or `calibration`."
                )
        return self

    @model_validator(mode="after")
    def _check_filter(self) -> Recipe:
        if self.output_weights not in (None, "none") and self.alpha != math.inf:
            check_filter(Filter(self.filter, self.directions))
        return self

    @property
    def anchor_parameters(self) -> dict[str, Any]:
        """The anchor's parameters, with the experts' own values in them; raises `ConfigError` for those that are not per expert."""
        return with_own_parameters(self.anchor, self.experts)

    @property
    def settings(self) -> MergeSettings:
        """The part that decides the algebra. Raises `ConfigError`."""
        walk = SequentialOptions(walk_dtype=self.calibration.dtype, **dict(self.sequential))
        algebra = {key: getattr(self, key) for key in Algebra.model_fields}
        called = [i for i, e in enumerate(self.experts) if self.host in (e.name, e.label, e.model)]
        algebra["host"] = called[0] if len(called) == 1 else self.host
        return MergeSettings(
            **algebra,
            mode=self.mode,
            anchor=self.anchor.name,
            anchor_parameters=self.anchor_parameters,
            sequential=walk,
        )

    def expert_name(self, index: int) -> str:
        return self.experts[index].label

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        local_files_only: bool = False,
        defaults: Mapping[str, Any] | None = None,
        write_to: Sequence[str | Path] = (),
        **overrides: Any,
    ) -> Recipe:
        """Read a recipe, or a mergekit configuration, which is translated (see `bmm_engine/recipe/mergekit/`); `overrides` replace top-level keys,
        `defaults` are for those that it does not give. `write_to`: folders, beside the recipe's and the working folder, that measured files may be
        written into.

        Raises `ConfigError` naming the file and key. `local_files_only`: to translate, never ask the hub.
        """
        path = Path(path)
        raw = load_yaml(path)
        if not isinstance(raw, dict):
            raise ConfigError(
                f"{path}: a recipe is a mapping with at least `base` and `experts`; this file holds a {type(raw).__name__}."
            )
        if mergekit.is_configuration(raw):
            raw = mergekit.translate(raw, path, local_files_only=local_files_only)
        raw = {**(defaults or {}), **raw, **{key: value for key, value in overrides.items() if value is not None}}
        recipe = cls.parse(raw, str(path), write_to=(path.parent, *write_to))
        try:
            return recipe._resolved(path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str = "recipe", *, write_to: Sequence[str | Path] = ()) -> Recipe:
        """Validate plain values. `write_to`: folders, beside the working folder, that measured files may be written into.

        Raises `ConfigError`: which key, its value, what is wrong, and the nearest known key."""
        try:
            recipe = cls.model_validate(raw)
        except ValidationError as error:
            raise ConfigError(f"{where}: {explain(error, _owner)}") from error
        recipe._writable = recipe._writable.and_in(write_to)
        return recipe

    def check_writable(self, key: str, *, missing_only: bool = True) -> None:
        """Refuse files of the experts' `key` ("grams", "fisher", "sensitivity") that would be written elsewhere than into the recipe's folder, the
        working folder, or one that was named. `missing_only`: those that exist are only read. Raises `ConfigError`."""
        for expert in self.experts:
            file = getattr(expert, key)
            if file is not None and not (missing_only and Path(file).exists()):
                self._writable.check(Path(file), f"expert {expert.label!r}: its `{key}` file")

    @property
    def mode_is_chosen(self) -> bool:
        """Did the recipe leave its mode open?"""
        return self.left_open("mode")

    def left_open(self, key: str) -> bool:
        """Was this key, which the mode decides then, not said?"""
        return key in self._chosen.keys

    def in_mode_plain(self) -> Recipe:
        """The same in the mode plain, with the choices and defaults of that mode for what it left open."""
        raw = {key: value for key, value in self.model_dump(exclude_unset=True).items() if key not in self._chosen.keys}
        recipe = Recipe.model_validate({**raw, "mode": "plain"})
        recipe._writable = self._writable
        return recipe

    def with_search(self, **changes: Any) -> Recipe:
        """With some keys of its search replaced. Raises `ConfigError`."""
        section = parse_section(SearchRecipe, {**self.search.model_dump(), **changes}, "search")
        return self.model_copy(update={"search": section})

    def plain(self) -> dict[str, Any]:
        """The recipe as plain values, without what is unset: what `bmm_merge.json` records."""
        return plain_values(self.model_dump(exclude_none=True))

    def _resolved(self, folder: Path) -> Recipe:
        """Paths relative to the recipe's `folder` made whole. Raises `ConfigError` for those that no file can have."""

        def local(value: str, key: str) -> str:
            """Relative to the recipe where that exists; a hub id or a path of the working directory stays as it is."""
            found = beside(value, key)
            return found if os.path.exists(found) else value

        def beside(value: str, key: str) -> str:
            check_path(value, key)
            found = str(folder / value)
            if value.startswith("~") and not os.path.lexists(found):
                found = str(folder / os.path.expanduser(value))
            check_path(found, key)
            return found

        def located(model: Any, key: str) -> Any:
            if isinstance(model, str):
                return local(model, key)
            if isinstance(model, StackRecipe):
                slices = [located(part, f"{key}.slices.{i}") for i, part in enumerate(model.slices)]
                return StackRecipe(slices=slices)
            adapter = None if model.adapter is None else local(model.adapter, f"{key}.adapter")
            return model.model_copy(update={"model": local(model.model, f"{key}.model"), "adapter": adapter})

        experts = []
        for i, e in enumerate(self.experts):
            given = {key: value for key in EXPERT_PATHS if (value := getattr(e, key)) is not None}
            paths = {key: beside(value, f"experts.{i}.{key}") for key, value in given.items()}
            experts.append(e.model_copy(update={"model": located(e.model, f"experts.{i}.model"), **paths}))
        return self.model_copy(update={"base": located(self.base, "base"), "experts": experts})


# Files of an expert, beside its model.
EXPERT_PATHS = ("grams", "calibration", "fisher", "sensitivity", "validation", "test", "head")

SECTIONS: dict[str, type[BaseModel]] = {
    "calibration": CalibrationRecipe,
    "sequential": SequentialRecipe,
    "evaluation": EvaluationRecipe,
    "search": SearchRecipe,
}


def _owner(loc: Sequence[str]) -> type[BaseModel]:
    """The type whose key the last part of a location is."""
    if "<slices>" in loc:
        return StackRecipe if loc[-2] == "<slices>" else SliceRecipe
    if "<model>" in loc:
        return ModelRecipe
    if len(loc) > 1 and loc[0] in SECTIONS:
        return SECTIONS[loc[0]]
    return ExpertRecipe if len(loc) > 1 and loc[0] == "experts" else Recipe

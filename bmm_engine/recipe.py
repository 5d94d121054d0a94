"""The YAML recipe of a merge, as validated types. Unknown keys are errors with a suggestion."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bmm_engine.errors import ConfigError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExpertRecipe(_Strict):
    """One fine-tune. `grams`: its Gram file, read if it exists, else made from `calibration` and kept there."""

    model: str
    name: str = ""
    grams: str | None = None
    calibration: str | None = None


class AnchorRecipe(BaseModel):
    """A merging rule by name; all other keys are its parameters."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class CalibrationRecipe(_Strict):
    """How calibration files are read."""

    samples: int = Field(256, ge=1, description="samples per expert")
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(128, ge=1, description="tokens per text")
    field: str = "text"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Recipe(_Strict):
    """Everything that decides a merge; paths are relative to the recipe's file."""

    base: str
    experts: list[ExpertRecipe] = Field(min_length=1)
    anchor: AnchorRecipe = AnchorRecipe(name="average")
    gram_source: Literal["data", "task_vectors", "hybrid"] | None = None
    hybrid_share: float = Field(0.5, ge=0, le=1)
    normalization: Literal["trace", "none"] = "trace"
    alpha: float = Field(
        0.03, ge=0, description="ridge relative to the mean diagonal of the Gram; inf is the anchor itself"
    )
    scale: float = 1.0
    task_weights: Literal["none", "energy"] | list[float] = "none"
    fit_bias: bool = False
    modules: list[str] | None = None
    keep_base: list[str] = []
    calibration: CalibrationRecipe = CalibrationRecipe()
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    max_shard_size: str | int = "5GB"
    device: str = "cpu"

    @field_validator("experts", mode="before")
    @classmethod
    def _plain_paths(cls, value: Any) -> Any:
        return (
            [{"model": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    @field_validator("anchor", mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("modules", "keep_base", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _choose_gram_source(self) -> Recipe:
        measured = [e.grams is not None or e.calibration is not None for e in self.experts]
        if self.gram_source is None:
            if any(measured) and not all(measured):
                lacking = self.experts[measured.index(False)].model
                raise ValueError(
                    f"expert {lacking!r} has neither `grams` nor `calibration`, others have; give all of them one, or none"
                )
            self.gram_source = "data" if all(measured) else "task_vectors"
        elif self.gram_source != "task_vectors" and not all(measured) and self.alpha != math.inf:
            lacking = self.experts[measured.index(False)].model
            raise ValueError(
                f"gram_source {self.gram_source!r} needs `grams` or `calibration` for every expert; {lacking!r} has none"
            )
        return self

    def expert_name(self, index: int) -> str:
        expert = self.experts[index]
        return expert.name or Path(expert.model).name

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Recipe:
        """Read a recipe file; `overrides` replace top-level keys. Raises `ConfigError` naming the file and key."""
        path = Path(path)
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: the recipe cannot be read ({error.strerror}).") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(
                f"{path}: a recipe is a mapping with at least `base` and `experts`; this file holds a {type(raw).__name__}."
            )
        raw.update({key: value for key, value in overrides.items() if value is not None})
        recipe = cls.parse(raw, str(path))
        return recipe._resolved(path.parent)

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str = "recipe") -> Recipe:
        """Validate plain values. Raises `ConfigError`: which key, its value, what is wrong, and the nearest known key."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise ConfigError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from error

    def plain(self) -> dict[str, Any]:
        """The recipe as plain values, without what is unset: what `bmm_merge.json` records."""
        values = self.model_dump(exclude_none=True)
        if self.alpha == math.inf:
            values["alpha"] = "inf"
        return values

    def _resolved(self, folder: Path) -> Recipe:
        def local(value: str | None) -> str | None:
            """Relative to the recipe where that exists; a hub id or a path of the working directory stays as it is."""
            return str(folder / value) if value is not None and (folder / value).exists() else value

        def beside(value: str | None) -> str | None:
            return None if value is None else str(folder / value)

        experts = [
            e.model_copy(
                update={"model": local(e.model), "grams": beside(e.grams), "calibration": beside(e.calibration)}
            )
            for e in self.experts
        ]
        return self.model_copy(update={"base": local(self.base), "experts": experts})


_MODELS: dict[str, type[BaseModel]] = {"experts": ExpertRecipe, "calibration": CalibrationRecipe}


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        model = _MODELS.get(str(error["loc"][0]), Recipe) if len(error["loc"]) > 1 else Recipe
        close = difflib.get_close_matches(key, model.model_fields, 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(model.model_fields)}."
        return f"unknown key {where!r}; {hint}"
    if error["type"] == "missing":
        return f"the key {where!r} is missing."
    return (
        f"{where} = {error['input']!r}: {error['msg'].removeprefix('Value error, ')}."
        if error["loc"]
        else f"{error['msg'].removeprefix('Value error, ')}."
    )

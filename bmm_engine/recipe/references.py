"""How a recipe names models, experts with what belongs to them, and an anchor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from bmm_engine.recipe.sections import Strict


class ModelRecipe(Strict):
    """A model that takes more than a path to name: a revision on the hub, a PEFT adapter on top."""

    model: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None


class SliceRecipe(ModelRecipe):
    """The layers `start <= j < stop` of a model."""

    layers: tuple[int, int]


class StackRecipe(Strict):
    """A model stacked from layers of others, one slice after another (see `checkpoint/compose.py`)."""

    slices: list[SliceRecipe] = Field(min_length=1)


def _form(value: Any) -> str:
    if isinstance(value, (dict, BaseModel)):
        return "<slices>" if "slices" in value or isinstance(value, StackRecipe) else "<model>"
    return "<path>"


# A path or hub id, or one of the two above. A tag in angle brackets never shows in messages.
ModelReference = Annotated[
    Annotated[str, Tag("<path>")] | Annotated[ModelRecipe, Tag("<model>")] | Annotated[StackRecipe, Tag("<slices>")],
    Discriminator(_form),
]


class ExpertRecipe(Strict):
    """One fine-tune. `grams`: its Gram file, read if it exists, else made from `calibration` and kept there. `fisher`, `sensitivity`: the same for
    its Fisher information, and for how much its predictions depend on its modules' outputs. `parameters`: its own values of the anchor's per-expert
    parameters; a plain list is a gradient over depth here.
    `validation`: labelled data of its task, which a search scores by; `test`: what the result is judged on. `head`: for a bare encoder, a
    safetensors file of its linear head (`weight` (classes, width), `bias`); `metric`: of its task, instead of the evaluation's."""

    model: ModelReference
    name: str = ""
    grams: str | None = None
    calibration: str | None = None
    fisher: str | None = None
    sensitivity: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    validation: str | None = None
    test: str | None = None
    head: str | None = None
    metric: Literal["accuracy", "macro_f1"] | None = None

    @property
    def label(self) -> str:
        """What to call the expert: its name, else the last part of its path."""
        return self.name or _last_part(self.model)


class AnchorRecipe(BaseModel):
    """A merging rule by name; all other keys are its parameters."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _last_part(model: Any) -> str:
    if isinstance(model, str):
        return Path(model).name
    if isinstance(model, StackRecipe):
        return " + ".join(f"{_last_part(part)}[{part.layers[0]}:{part.layers[1]}]" for part in model.slices)
    return Path(model.model).name + (f"+{Path(model.adapter).name}" if model.adapter else "")

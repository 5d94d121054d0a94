"""The parameters of an anchor, with those that experts give for themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bmm_engine.anchors import get_anchor
from bmm_engine.errors import ConfigError, shown
from bmm_engine.recipe.references import AnchorRecipe, ExpertRecipe


def with_own_parameters(anchor: AnchorRecipe, experts: Sequence[ExpertRecipe]) -> dict[str, Any]:
    """The anchor's parameters, with the experts' own values in them; raises `ConfigError` for those that are not per expert."""
    rule = get_anchor(anchor.name)
    schema = {p["name"]: p for p in rule.schema}
    given = {_singular(key, schema): value for key, value in anchor.parameters.items()}
    own = [{_singular(key, schema): value for key, value in e.parameters.items()} for e in experts]
    for expert, parameters in zip(experts, own, strict=True):
        for key in parameters:
            if key not in schema:
                rule.parameters({key: None})  # raises, with the nearest name
            if not schema[key]["per_expert"]:
                raise ConfigError(
                    f"expert {shown(expert.label)}: parameters.{key}: anchor {rule.name!r} has one {key} for all experts; give it under `anchor`."
                )
    for key in {key for parameters in own for key in parameters}:
        common = given.get(key, schema[key]["default"])
        given[key] = [_value_of(p, key, _share(common, t, len(own))) for t, p in enumerate(own)]
    return given


def _singular(key: str, schema: Mapping[str, Any]) -> str:
    """A per-expert parameter may be named in the plural: weights."""
    single = key.removesuffix("s")
    return single if key not in schema and single in schema and schema[single]["per_expert"] else key


def _is_filters(raw: Any) -> bool:
    return isinstance(raw, (list, tuple)) and bool(raw) and all(isinstance(c, Mapping) and "value" in c for c in raw)


def _share(raw: Any, expert: int, experts: int) -> Any:
    """One expert's part of a per-expert value, in the forms of `anchors/settings.py`."""
    if _is_filters(raw):
        return [{**case, "value": _share(case["value"], expert, experts)} for case in raw]
    if isinstance(raw, (list, tuple)):
        if len(raw) != experts:
            raise ConfigError(
                f"anchor: {shown(list(raw))} has {len(raw)} values for {experts} experts; give one for each, or one for all. (A gradient over depth"
                " is written {gradient: [...]} here.)"
            )
        return raw[expert]
    return raw


def _value_of(parameters: Mapping[str, Any], key: str, common: Any) -> Any:
    """An expert's own value, `common` where it has none, or none that matches."""
    if parameters.get(key) is None:
        return common
    raw = parameters[key]
    if isinstance(raw, Mapping) and "value" in raw:
        raw = [raw]
    if _is_filters(raw):
        return [*raw, {"value": common}]
    return {"gradient": list(raw)} if isinstance(raw, (list, tuple)) else raw

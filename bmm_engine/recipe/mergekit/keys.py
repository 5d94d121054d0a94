"""Keys and model references of mergekit's files."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bmm_engine.errors import ConfigError, shown

logger = logging.getLogger(__name__)

# Keys that decide something in their place, and so were meant to.
_ELSEWHERE = (
    "layer_range",
    "models",
    "slices",
    "modules",
    "sources",
    "parameters",
    "model",
    "lora",
    "tokens",
    "filter",
    "value",
)


def parse_reference(value: Any, where: str, exists: Callable[[str], bool] = lambda path: False) -> str | dict[str, Any]:
    """`path`, `path@revision`, `path+lora`, `{model: ..., lora: ...}`, as a recipe has it. What `exists` is a path as it stands, with '+' and '@'."""
    if isinstance(value, str):
        model, lora = _split(value, exists)
        if lora is not None and "+" in lora and not exists(lora):
            raise ConfigError(f"{where} = {shown(value)}: more than one '+'; write {{model: ..., lora: ...}}.")
        value = {"model": model, "lora": lora}
    check_keys(value, ("model", "lora", "override_architecture"), where)
    if value.get("override_architecture"):
        raise ConfigError(
            f"{where}.override_architecture is not supported; correct `architectures` in the model's config.json."
        )
    if "model" not in value:
        raise ConfigError(f"{where}: the key 'model' is missing.")
    model, revision = _located(value["model"], f"{where}.model", exists)
    reference = {"model": model, "revision": revision}
    if value.get("lora") is not None:
        reference["adapter"], reference["adapter_revision"] = _located(value["lora"], f"{where}.lora", exists)
    reference = {key: item for key, item in reference.items() if item is not None}
    return model if set(reference) == {"model"} else reference


def _split(text: str, exists: Callable[[str], bool]) -> tuple[str, str | None]:
    """Model and adapter: at the '+' that leaves a path on the left, where there is one; else at the first."""
    places = [i for i, letter in enumerate(text) if letter == "+"]
    if not places or exists(text):
        return text, None
    place = next((i for i in reversed(places) if exists(text[:i])), places[0])
    return text[:place], text[place + 1 :]


def _located(value: Any, where: str, exists: Callable[[str], bool]) -> tuple[str, str | None]:
    if isinstance(value, Mapping):
        check_keys(value, ("path", "revision"), where)
        path, revision = value.get("path"), value.get("revision")
    elif exists(str(value)):
        return str(value), None
    else:
        path, _, revision = str(value).partition("@")
    if not isinstance(path, str) or not path or (revision and "@" in revision):
        raise ConfigError(f"{where} = {shown(value)}: write a path, path@revision, or {{path: ..., revision: ...}}.")
    return path, revision or None


def reference_text(reference: str | Mapping[str, Any]) -> str:
    if isinstance(reference, str):
        return repr(reference)
    return repr("+".join(str(reference[key]) for key in ("model", "adapter") if key in reference))


def items(value: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{where}.{key} = {shown(found)}: it must be a list.".lstrip("."))
    return found


def check_keys(value: Any, known: Sequence[str], where: str, idle: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for a key that is none of the `known`. mergekit passes over any; here only those that are `idle` where they stand, and
    those that are like none of its own, with a warning: a slip of the pen is no key without effect."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} = {shown(value)}: it must be a mapping with {', '.join(known)}.")
    for key in value:
        if key in known:
            continue
        name = shown(f"{where}.{key}".lstrip("."))
        close = difflib.get_close_matches(str(key), known, 1, 0.5)
        if key in idle or (not close and key not in _ELSEWHERE):
            logger.warning("the key %s has no effect (nor has it in mergekit)", name)
            continue
        hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}."
        raise ConfigError(f"unknown key {name}; {hint}")

"""Keys and model references of mergekit's files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from bmm_engine.errors import ConfigError, shown


def parse_reference(value: Any, where: str) -> str | dict[str, Any]:
    """`path`, `path@revision`, `path+lora`, `{model: ..., lora: ...}`, as a recipe has it."""
    if isinstance(value, str):
        model, *loras = value.split("+")
        if len(loras) > 1:
            raise ConfigError(f"{where} = {shown(value)}: more than one '+'; write {{model: ..., lora: ...}}.")
        value = {"model": model, "lora": loras[0] if loras else None}
    check_keys(value, ("model", "lora", "override_architecture"), where)
    if value.get("override_architecture"):
        raise ConfigError(
            f"{where}.override_architecture is not supported; correct `architectures` in the model's config.json."
        )
    if "model" not in value:
        raise ConfigError(f"{where}: the key 'model' is missing.")
    model, revision = _located(value["model"], f"{where}.model")
    reference = {"model": model, "revision": revision}
    if value.get("lora") is not None:
        reference["adapter"], reference["adapter_revision"] = _located(value["lora"], f"{where}.lora")
    reference = {key: item for key, item in reference.items() if item is not None}
    return model if set(reference) == {"model"} else reference


def _located(value: Any, where: str) -> tuple[str, str | None]:
    if isinstance(value, Mapping):
        check_keys(value, ("path", "revision"), where)
        path, revision = value.get("path"), value.get("revision")
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


def check_keys(value: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} = {shown(value)}: it must be a mapping with {', '.join(known)}.")
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}."
            raise ConfigError(f"unknown key {f'{where}.{key}'.lstrip('.')!r}; {hint}")

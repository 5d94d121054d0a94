"""Settings as keywords of a function, so that an option of the algebra need not be written once more for each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from pydantic.fields import FieldInfo

from bmm_engine.errors import ConfigError
from bmm_engine.recipe.explain import unknown_key
from bmm_engine.recipe.settings import Algebra, MergeSettings, SequentialOptions, defaults_of

F = TypeVar("F", bound=Callable[..., Any])

# What follows from other keywords: `grams`, `hybrid`, `batches`.
_DERIVED = ("mode", "gram_source", "hybrid_share", "sequential")


def keywords_of(mode: str) -> dict[str, FieldInfo]:
    """Keyword -> the field that it fills, of a merge in that mode; those of the walk last."""
    first = {key: MergeSettings.model_fields[key] for key in ("anchor", "anchor_parameters")}
    algebra = {key: field for key, field in Algebra.model_fields.items() if key not in _DERIVED}
    return {**first, **algebra, **(SequentialOptions.model_fields if mode == "sequential" else {})}


def settings_of(mode: str, options: Mapping[str, Any], **derived: Any) -> MergeSettings:
    """The keywords `options` as settings. `task_weights` None is "none". Raises `ConfigError`, for a keyword that nobody knows too."""
    known = keywords_of(mode)
    for key in options:
        if key not in known:
            raise ConfigError(unknown_key(key, known))
    walk = {key: value for key, value in options.items() if key not in MergeSettings.model_fields}
    algebra = {key: value for key, value in options.items() if key not in walk}
    if "task_weights" in algebra and algebra["task_weights"] is None:
        algebra["task_weights"] = "none"
    if walk:
        derived["sequential"] = SequentialOptions(**walk)
    return MergeSettings(mode=mode, **algebra, **derived)


def takes_settings(mode: str) -> Callable[[F], F]:
    """For a function that hands its `**options` to `settings_of`: they stand in its signature and in its docstring, and a keyword that is neither its
    own nor one of them is a `ConfigError` with the nearest name."""

    def decorate(function: F) -> F:
        fields, chosen = keywords_of(mode), defaults_of(mode)
        defaults = {key: chosen.get(key, field.get_default()) for key, field in fields.items()}
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        more = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=defaults[key]) for key in fields]
        known = [p.name for p in (*own, *more)]

        @functools.wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            for key in keywords:
                if key not in known:
                    raise ConfigError(f"{function.__name__}: {unknown_key(key, known)}")
            return function(*args, **keywords)

        said = {key: (field.description or "").replace("null", "None") for key, field in fields.items()}
        lines = [f"`{key}` ({defaults[key]!r}): {said[key]}" for key in fields]
        checked.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Settings:", *lines])
        checked.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return cast(F, checked)

    return decorate

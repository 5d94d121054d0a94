"""The values of mergekit's parameters: scalars, gradients, and lists with filters, as the recipe has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bmm_engine.errors import ConfigError, shown
from bmm_engine.recipe.mergekit.keys import check_keys


@dataclass(frozen=True)
class Gradient:
    values: tuple[Any, ...]

    def at(self, t: float) -> Any:
        position = t * (len(self.values) - 1)
        low = int(position)
        if not isinstance(self.values[low], float):
            return self.values[low]
        share = position - low
        return (1 - share) * self.values[low] + share * self.values[min(low + 1, len(self.values) - 1)]


# (filter or None, value or gradient), to the first without a filter.
Chain = tuple[tuple[str | None, Any], ...]


def cases(setting: Any, where: str, convert: Callable[[Any], Any]) -> Iterator[tuple[str | None, Any]]:
    """A setting's values with their filters; none for what is not set."""
    if setting is None:
        return
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list) or not any(isinstance(item, Mapping) for item in setting):
        if setting != []:
            yield None, _scalars(setting, where, convert)
        return
    for case in setting:
        check_keys(case, ("filter", "value"), where)
        if "value" not in case:
            raise ConfigError(f"{where}: {shown(dict(case))} has no value.")
        pattern = case.get("filter")
        yield (None if pattern in (None, "*") else str(pattern)), _scalars(case["value"], where, convert)


def _scalars(value: Any, where: str, convert: Callable[[Any], Any]) -> Any:
    """One value, or a gradient."""
    try:
        if isinstance(value, list):
            return Gradient(tuple(convert(item) for item in value))
        return convert(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} = {shown(value)}: {error}.") from error


def chain_at(chain: Chain, t: float) -> Chain:
    return tuple((pattern, value.at(t) if isinstance(value, Gradient) else value) for pattern, value in chain)


def rendered(chain: Chain) -> Any:
    plain = [
        (pattern, {"gradient": list(value.values)} if isinstance(value, Gradient) else value)
        for pattern, value in chain
    ]
    if len(plain) == 1:
        return plain[0][1]
    return [{"value": value} if pattern is None else {"filter": pattern, "value": value} for pattern, value in plain]

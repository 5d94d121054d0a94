"""One mergekit configuration on its way to a recipe."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bmm_engine.checkpoint import Checkpoint
from bmm_engine.checkpoint.compose import LayerStack, stands_before
from bmm_engine.errors import ConfigError, cut, shown
from bmm_engine.recipe.mergekit.keys import check_keys, items, parse_reference, reference_text
from bmm_engine.recipe.mergekit.methods import KNOWN, METHODS, REQUIRED, VECTORS, Parameter, switch
from bmm_engine.recipe.mergekit.values import Chain, cases, chain_at, rendered

logger = logging.getLogger(__name__)

_TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "modules",
)
MOST_LAYERS = 100_000  # far beyond any network; what a file says is checked before it is counted through
_GLOBS = frozenset("*?[")


@dataclass(frozen=True)
class _Source:
    """One model of a slice; `reference` as a recipe has it."""

    reference: str | dict[str, Any]
    layers: tuple[int, int] | None
    parameters: Mapping[str, Any]
    where: str
    again: tuple[Mapping[str, Any], ...] = ()  # the parameters of its further mentions


@dataclass(frozen=True)
class _Slice:
    base: _Source | None
    experts: tuple[_Source, ...]
    parameters: Mapping[str, Any]


class Translation:
    def __init__(self, raw: Mapping[str, Any], path: Path, local_files_only: bool):
        self.raw, self.path, self.local_files_only = raw, path, local_files_only
        check_keys(raw, _TOP, "")
        name = raw["merge_method"]
        if not isinstance(name, str) or name not in METHODS:
            close = difflib.get_close_matches(cut(str(name)), METHODS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(sorted(METHODS))}."
            raise ConfigError(f"merge_method {shown(name)} is not known here; {hint}")
        self.name, self.method = str(name), METHODS[name]
        self.base_model = None if raw.get("base_model") is None else self._reference(raw["base_model"], "base_model")
        self.parameters = self._scope(raw, "")
        self.body, self.within = self._body()
        self.module_parameters = self._scope(self.body, self.within) if self.within else {}
        self.slices = self._slices()
        counts = {len(s.experts) for s in self.slices}
        if len(counts) > 1:
            raise ConfigError(f"slices: they merge {sorted(counts)} models; give every slice as many sources.")
        if len({s.base is None for s in self.slices}) > 1:
            raise ConfigError("slices: some have a base_model, some have none; give it to all of them, or to none.")
        self.stacked = self.slices[0].experts[0].layers is not None

    def recipe(self) -> dict[str, Any]:
        first = self.slices[0]
        has_base = first.base is not None
        count = len(first.experts)
        experts = [{"model": self._column([s.experts[i] for s in self.slices])} for i in range(count)]
        anchor: dict[str, Any] = {"name": self.method.rule, **self.method.fixed}
        if self.method.base == "optional":
            anchor |= self.method.with_base if has_base else self.method.without_base
        for name, parameter in self.method.parameters.items():
            if not parameter.each:
                anchor[parameter.ours] = self._value(name, parameter, [None] * len(self.slices))
                continue
            for i, expert in enumerate(experts):
                value = self._value(name, parameter, [s.experts[i] for s in self.slices])
                expert.setdefault("parameters", {})[parameter.ours] = value
        if self.name == "nuslerp":
            anchor["vectors"] = self._vectors()
        recipe: dict[str, Any] = {
            "base": self._column([s.base for s in self.slices if s.base]) if has_base else self._first(experts),
            "experts": experts,
            "anchor": anchor,
            "alpha": math.inf,
        }
        if dtype := self._dtype():
            recipe["dtype"] = dtype
        if self._same_tokenizer():
            recipe["same_tokenizer"] = True
        if template := self._chat_template():
            recipe["chat_template"] = template
        return recipe

    # Models

    def _reference(self, value: Any, where: str) -> str | dict[str, Any]:
        return parse_reference(value, where, self._exists)

    def _exists(self, path: str) -> bool:
        """Whether it is a path as it stands: beside the file, or in the working folder."""
        try:
            own = os.path.expanduser(path)
            return bool(path) and (os.path.lexists(self.path.parent / own) or os.path.lexists(own))
        except ValueError:  # a zero byte
            return False

    def _body(self) -> tuple[Mapping[str, Any], str]:
        """What holds `models` or `slices`, and where it is: the file, or the one module of a model that has one."""
        modules = self.raw.get("modules")
        if not modules:
            return self.raw, ""
        if not isinstance(modules, Mapping) or list(modules) != ["default"]:
            raise ConfigError(
                "modules: models of several parts are not supported; merge one part at a time, with `models` or `slices`."
            )
        if self.raw.get("models") or self.raw.get("slices"):
            raise ConfigError("exactly one of `models`, `slices` and `modules` must be there.")
        check_keys(modules["default"], ("models", "slices", "parameters"), "modules.default", _TOP)
        return modules["default"], "modules.default"

    def _slices(self) -> list[_Slice]:
        body, within = self.body, f"{self.within}." if self.within else ""
        if bool(body.get("models")) == bool(body.get("slices")):
            where = f"{self.within}: " if within else ""
            raise ConfigError(f"{where}exactly one of `models` and `slices` must be there.")
        if body.get("models"):
            sources = [
                self._source(item, f"{within}models.{i}", ("model", "parameters"))
                for i, item in enumerate(items(body, "models", self.within))
            ]
            if self.base_model is not None and all(s.reference != self.base_model for s in sources):
                sources.append(_Source(self.base_model, None, {}, "base_model"))
            return [self._slice(sources, self.base_model, {}, f"{within}models")]
        return [
            self._out_slice(item, f"{within}slices.{i}") for i, item in enumerate(items(body, "slices", self.within))
        ]

    def _out_slice(self, item: Any, where: str) -> _Slice:
        check_keys(item, ("sources", "base_model", "parameters"), where, (*_TOP, "residual_weight"))
        sources = [
            self._source(source, f"{where}.sources.{j}", ("model", "layer_range", "parameters"))
            for j, source in enumerate(items(item, "sources", where))
        ]
        lengths = {s.layers[1] - s.layers[0] for s in sources if s.layers}
        if len(lengths) > 1:
            raise ConfigError(
                f"{where}: its sources have {sorted(lengths)} layers; ranges of one slice must be equally long."
            )
        base = item.get("base_model")
        reference = self.base_model if base is None else self._reference(base, f"{where}.base_model")
        return self._slice(sources, reference, self._scope(item, where), where)

    def _source(self, item: Any, where: str, keys: Sequence[str]) -> _Source:
        check_keys(item, keys, where, _TOP)
        if "model" not in item:
            raise ConfigError(f"{where}: the key 'model' is missing.")
        layers = None
        if "layer_range" in keys:
            layers = item.get("layer_range")
            if isinstance(layers, list):
                layers = [int(v) if isinstance(v, float) and v.is_integer() else v for v in layers]
            if not (isinstance(layers, list) and len(layers) == 2 and all(type(v) is int for v in layers)):
                raise ConfigError(
                    f"{where}.layer_range = {shown(layers)}: give the first layer and the one after the last, as [0, 16]."
                )
            layers = (layers[0], layers[1])
            if not 0 <= layers[0] <= layers[1] <= MOST_LAYERS:
                raise ConfigError(
                    f"{where}.layer_range = {shown(layers)}: the first layer must not come after the last, from 0 to {MOST_LAYERS}."
                )
        return _Source(self._reference(item["model"], f"{where}.model"), layers, self._scope(item, where), where)

    def _slice(
        self, sources: Sequence[_Source], base: str | dict[str, Any] | None, parameters: Mapping[str, Any], where: str
    ) -> _Slice:
        sources = self._once(sources)
        found = next((s for s in sources if s.reference == base), None) if self.method.base != "ignored" else None
        if found is None and (self.method.base == "required" or (self.method.base == "optional" and base is not None)):
            wanted = (
                "base_model is missing"
                if base is None
                else f"base_model {reference_text(base)} is not among its sources"
            )
            raise ConfigError(f"{where}: {self.name} needs a base model to start from, but {wanted}.")
        experts = tuple(s for s in sources if s is not found)
        if not experts:
            raise ConfigError(f"{where}: there is no model beside the base; name at least one to merge.")
        return _Slice(found, experts, parameters)

    def _once(self, sources: Sequence[_Source]) -> list[_Source]:
        """Each model once, as mergekit has it, which keeps what it merges by model: the layers of the last mention, each parameter of the first that
        gives it."""
        found: list[_Source] = []
        for source in sources:
            at = next((i for i, other in enumerate(found) if other.reference == source.reference), None)
            if at is None:
                found.append(source)
                continue
            first = found[at]
            logger.warning(
                "%s: %s names %s again: it is merged once, as mergekit does, with the parameters of %s%s",
                self.path,
                source.where,
                reference_text(source.reference),
                first.where,
                "" if first.layers == source.layers else f" and the layers {list(source.layers or ())}",
            )
            found[at] = replace(first, layers=source.layers, again=(*first.again, source.parameters))
        return found

    def _column(self, sources: Sequence[_Source]) -> Any:
        """One model of the recipe: what stands at one place of every slice."""
        if not self.stacked:
            return sources[0].reference
        parts = []
        for source in sources:
            reference = source.reference if isinstance(source.reference, dict) else {"model": source.reference}
            parts.append({**reference, "layers": list(source.layers or ())})
        return {"slices": parts}

    def _first(self, experts: Sequence[Mapping[str, Any]]) -> Any:
        """Where no model is the base, names, config and tokenizer come from `base_model` if it is merged, else from the first."""
        for source, expert in zip(self.slices[0].experts, experts, strict=True):
            if source.reference == self.base_model:
                return expert["model"]
        return experts[0]["model"]

    # Parameters

    def _scope(self, value: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        parameters = value.get("parameters") or {}
        check_keys(parameters, KNOWN, f"{where}.parameters".lstrip("."))
        for name in parameters:
            if (
                name not in self.method.parameters
                and name != "int8_mask"
                and not (self.name == "nuslerp" and name in VECTORS)
            ):
                logger.warning("%s: parameters.%s has no effect on merge_method %s", self.path, name, self.name)
        return parameters

    def _value(self, name: str, parameter: Parameter, sources: Sequence[_Source | None]) -> Any:
        """A parameter in the forms of `anchors/settings.py`; `sources`: whose it is in each slice, None for one of all models."""
        chains = [self._chain(name, parameter, own, source) for own, source in zip(self.slices, sources, strict=True)]
        if len(chains) == 1:
            return rendered(chains[0])
        layers = [
            chain_at(chain, i / (count - 1) if count > 1 else 1.0)
            for chain, own in zip(chains, self.slices, strict=True)
            for count in [_length(own)]
            for i in range(count)
        ]
        before, after = chain_at(chains[0], 0.0), chain_at(chains[-1], 0.0)
        if all(chain == before for chain in [*layers, after]):
            return rendered(before)
        prefix, names = self._names()
        cases = [{"filter": f"{prefix}{i}.*", "value": rendered(chain)} for i, chain in enumerate(layers)]
        if before != after:
            cases += [{"filter": own, "value": rendered(before)} for own in names]
        return [*cases, {"value": rendered(after)}]

    def _chain(self, name: str, parameter: Parameter, own: _Slice, source: _Source | None) -> Chain:
        scopes = [(own.parameters, "slice"), (self.module_parameters, self.within), (self.parameters, "")]
        if source is not None:
            scopes = [(given, source.where) for given in (source.parameters, *source.again)] + scopes
        chain: list[tuple[str | None, Any]] = []
        for scope, where in scopes:
            for pattern, value in cases(scope.get(name), f"{where}.parameters.{name}".lstrip("."), parameter.convert):
                self._check_filter(pattern, name)
                chain.append((pattern, value))
                if pattern is None:
                    return tuple(chain)
        if parameter.default is REQUIRED:
            of = f" of {reference_text(source.reference)}" if source is not None else ""
            state = "has values with a filter only; add one without" if chain else "is missing"
            raise ConfigError(f"parameters.{name}{of} {state}; {self.name} needs it for every tensor.")
        return (*chain, (None, parameter.convert(parameter.default)))

    def _check_filter(self, pattern: str | None, name: str) -> None:
        if pattern is None:
            return
        if _GLOBS & set(pattern):
            raise ConfigError(
                f"parameters.{name}: the filter {shown(pattern)} is taken to the letter by mergekit and matches nothing; write the part of the name."
            )
        if any(c.isdigit() for c in pattern) and self._renumbers():
            raise ConfigError(
                f"parameters.{name}: the filter {shown(pattern)} names a layer, and slices number layers anew; give the parameter to the slice."
            )

    def _renumbers(self) -> bool:
        """Whether some layer has another number in the output than in its model."""
        offset = 0
        for own in self.slices:
            if any(s.layers and s.layers[0] != offset for s in (own.base, *own.experts) if s is not None):
                return True
            offset += _length(own)
        return False

    def _names(self) -> tuple[str, list[str]]:
        """How the first model calls its layers, and its tensors before them."""
        reference = (self.slices[0].base or self.slices[0].experts[0]).reference
        model, revision = (
            (reference, None) if isinstance(reference, str) else (reference["model"], reference.get("revision"))
        )
        beside = self.path.parent / model
        source = Checkpoint.open(
            str(beside) if beside.exists() else model, revision=revision, local_files_only=self.local_files_only
        )
        stack = LayerStack(source)
        return stack.prefix, [n for n in source.names() if stack.split(n) is None and stands_before(n)]

    def _vectors(self) -> str:
        chosen = {}
        for name, default in VECTORS.items():
            value = self._value(name, switch(name, default), [None] * len(self.slices))
            if not isinstance(value, bool):
                raise ConfigError(f"parameters.{name}: give one value for all tensors.")
            chosen[name] = value
        # mergekit's word: "row-wise" normalises along dimension 0, so each column is a vector.
        return "tensor" if chosen["nuslerp_flatten"] else "columns" if chosen["nuslerp_row_wise"] else "rows"

    # The rest

    def _dtype(self) -> str | None:
        for key in ("out_dtype", "dtype"):
            if value := self.raw.get(key):
                name = str(value).removeprefix("torch.")
                if name not in ("float32", "bfloat16", "float16", "float64"):
                    raise ConfigError(f"{key} = {shown(value)}: it must be float32, bfloat16, float16 or float64.")
                return name
        return None

    def _chat_template(self) -> str | None:
        """`auto`, or the text of a template; mergekit's own, which it has under names, are not here."""
        template = self.raw.get("chat_template")
        if template is None or template == "auto":
            return template
        if not isinstance(template, str) or len(template) < 20 or "{" not in template:
            raise ConfigError(
                f"chat_template = {shown(template)}: the templates that mergekit has under names are not here; write `auto` (the one that most of the"
                " models have), or the text of a template."
            )
        return template

    def _same_tokenizer(self) -> bool:
        """Whether a tokenizer is asked for. Only one that all models share can be given, which leaves the embeddings as they are."""
        source, key = self.raw.get("tokenizer_source"), "tokenizer_source"
        if (tokenizer := self.raw.get("tokenizer")) is not None:
            if source is not None:
                raise ConfigError("tokenizer_source and tokenizer exclude each other.")
            check_keys(tokenizer, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
            for unsupported in ("tokens", "pad_to_multiple_of"):
                if tokenizer.get(unsupported):
                    raise ConfigError(
                        f"tokenizer.{unsupported}: embeddings are not rearranged here; remove it, or see `vocabulary` of a recipe."
                    )
            source, key = tokenizer.get("source", "union"), "tokenizer.source"
        if source is None:
            return False
        if source == "base" and self.base_model is None:
            raise ConfigError(f"{key}: base, but there is no base_model.")
        if source not in ("base", "union"):
            wanted = self._reference(source, key)
            merged = [s.reference for own in self.slices for s in (own.base, *own.experts) if s is not None]
            if wanted not in (*merged, self.base_model):
                raise ConfigError(
                    f"{key}: {reference_text(wanted)} is none of the models merged; name one of them, or base."
                )
        return True


def _length(own: _Slice) -> int:
    start, stop = own.experts[0].layers or (0, 0)
    return stop - start

"""mergekit's YAML configurations, read as recipes of this engine: the same merge, up to rounding and to random numbers.

What differs: arithmetic is in float32 or float64 whatever `dtype` says, which is the output's here (mergekit also casts the inputs to it);
`int8_mask` changes nothing; random pruning draws other numbers; paths are looked up beside the file first. A tokenizer may be asked for where
all models have the same: embeddings then keep all their rows, those beyond the tokenizer's tokens too. What cannot be carried over is an error
that names the key.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bmm_engine.checkpoint import Checkpoint
from bmm_engine.checkpoint.compose import LayerStack, stands_before
from bmm_engine.errors import ConfigError

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
_GLOBS = frozenset("*?[")
_REQUIRED = object()


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a mergekit method: `ours` is what the rule calls it, `each` whether it has a value for each model."""

    ours: str
    default: Any = _REQUIRED
    each: bool = False
    convert: Callable[[Any], Any] = field(default=float)


def _flag(value: Any) -> bool:
    text = str(value).lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise ValueError("it must be true or false")


def _l1(value: Any) -> str:
    return "l1" if _flag(value) else "none"


@dataclass(frozen=True)
class _Method:
    """How a merge method is carried out here: by which rule, with which of its options fixed.

    `base`: whether the base model is apart from those merged ("required"), may be ("optional", then `with_base` and `without_base` are
    fixed accordingly), or is one of them ("ignored").
    """

    rule: str
    base: Literal["required", "optional", "ignored"]
    parameters: Mapping[str, _Parameter]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    with_base: Mapping[str, Any] = field(default_factory=dict)
    without_base: Mapping[str, Any] = field(default_factory=dict)


_WEIGHT = _Parameter("weight", each=True)
_ORIGIN: dict[str, Any] = {"with_base": {"origin": "base"}, "without_base": {"origin": "zero"}}


def _switch(ours: str, default: bool) -> _Parameter:
    return _Parameter(ours, default, convert=_flag)


def _arithmetic(*, normalize: bool, rescale: bool | None = None, **more: float) -> dict[str, _Parameter]:
    """The parameters of mergekit's family of task arithmetic; `rescale` is None for those that prune nothing."""
    parameters = {"weight": _WEIGHT, "lambda": _Parameter("scaling", 1.0), "normalize": _switch("normalize", normalize)}
    if rescale is not None:
        parameters["density"] = _Parameter("density", 1.0, each=True)
        parameters["rescale"] = _Parameter("rescale", rescale, convert=_l1)
    return parameters | {name: _Parameter(name, default, each=True) for name, default in more.items()}


_METHODS: dict[str, _Method] = {
    "linear": _Method("average", "ignored", {"weight": _WEIGHT, "normalize": _switch("normalize", True)}),
    "task_arithmetic": _Method("task_arithmetic", "required", _arithmetic(normalize=False)),
    "ties": _Method(
        "ties", "required", _arithmetic(normalize=True, rescale=False), {"threshold": "tensor", "tie": "positive"}
    ),
    "dare_linear": _Method("dare_linear", "required", _arithmetic(normalize=False, rescale=True)),
    "dare_ties": _Method(
        "dare_ties", "required", _arithmetic(normalize=False, rescale=True), {"trim": 1.0, "tie": "positive"}
    ),
    "breadcrumbs": _Method("breadcrumbs", "required", _arithmetic(normalize=False, rescale=False, gamma=0.01)),
    "breadcrumbs_ties": _Method(
        "breadcrumbs_ties", "required", _arithmetic(normalize=False, rescale=False, gamma=0.01)
    ),
    "della": _Method("della", "required", _arithmetic(normalize=True, rescale=True, epsilon=0.15)),
    "della_linear": _Method("della_linear", "required", _arithmetic(normalize=False, rescale=True, epsilon=0.15)),
    "sce": _Method("sce", "required", {"select_topk": _Parameter("select_topk", 1.0)}, {"epsilon": 1e-6}),
    "slerp": _Method("slerp", "required", {"t": _Parameter("t")}),
    "nuslerp": _Method("nuslerp", "optional", {"weight": _WEIGHT}, **_ORIGIN),
    "multislerp": _Method(
        "multislerp", "optional", {"weight": _WEIGHT, "normalize_weights": _switch("normalize", True)}, **_ORIGIN
    ),
    "karcher": _Method(
        "karcher", "ignored", {"max_iter": _Parameter("steps", 10, convert=int), "tol": _Parameter("tolerance", 1e-5)}
    ),
    "model_stock": _Method("model_stock", "required", {"filter_wise": _switch("filter_wise", False)}),
    "nearswap": _Method("nearswap", "required", {"t": _Parameter("t")}),
    "arcee_fusion": _Method("arcee_fusion", "required", {}),
    "ram": _Method("ram", "required", {"epsilon": _Parameter("epsilon", 1e-5)}),
    "ramplus_tl": _Method(
        "ram_plus",
        "required",
        {"r": _Parameter("r", 0.1), "alpha": _Parameter("alpha", 0.2), "epsilon": _Parameter("epsilon", 1e-5)},
        {"extent": "tensor"},
    ),
    "passthrough": _Method("passthrough", "ignored", {"scale": _Parameter("scale", 1.0, each=True)}),
}
# Two parameters of nuslerp become one here.
_VECTORS = {"nuslerp_flatten": True, "nuslerp_row_wise": False}
_KNOWN = sorted({name for method in _METHODS.values() for name in method.parameters} | {"int8_mask", "eps", *_VECTORS})


def is_configuration(raw: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is mergekit's."""
    return "merge_method" in raw


def translate(raw: Mapping[str, Any], path: Path, *, local_files_only: bool = False) -> dict[str, Any]:
    """The plain values of the recipe that does what a mergekit configuration says; model paths stay as they are written.

    Headers are read only where parameters differ between several slices. Raises `ConfigError` naming the file and key.
    """
    try:
        return _Translation(raw, path, local_files_only).recipe()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _Source:
    """One model of a slice; `reference` as a recipe has it."""

    reference: str | dict[str, Any]
    layers: tuple[int, int] | None
    parameters: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class _Slice:
    base: _Source | None
    experts: tuple[_Source, ...]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class _Gradient:
    values: tuple[Any, ...]

    def at(self, t: float) -> Any:
        position = t * (len(self.values) - 1)
        low = int(position)
        if not isinstance(self.values[low], float):
            return self.values[low]
        share = position - low
        return (1 - share) * self.values[low] + share * self.values[min(low + 1, len(self.values) - 1)]


# (filter or None, value or gradient), to the first without a filter.
_Chain = tuple[tuple[str | None, Any], ...]


class _Translation:
    def __init__(self, raw: Mapping[str, Any], path: Path, local_files_only: bool):
        self.raw, self.path, self.local_files_only = raw, path, local_files_only
        _check_keys(raw, _TOP, "")
        name = raw["merge_method"]
        if name not in _METHODS:
            close = difflib.get_close_matches(str(name), _METHODS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(sorted(_METHODS))}."
            raise ConfigError(f"merge_method {name!r} is not known here; {hint}")
        self.name, self.method = str(name), _METHODS[name]
        self.base_model = None if raw.get("base_model") is None else _reference(raw["base_model"], "base_model")
        self.parameters = self._scope(raw, "")
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
        return recipe

    # Models

    def _slices(self) -> list[_Slice]:
        if self.raw.get("modules"):
            raise ConfigError(
                "modules: models of several parts are not supported; merge one part at a time, with `models` or `slices`."
            )
        if bool(self.raw.get("models")) == bool(self.raw.get("slices")):
            raise ConfigError("exactly one of `models` and `slices` must be there.")
        if self.raw.get("models"):
            sources = [
                self._source(item, f"models.{i}", ("model", "parameters"))
                for i, item in enumerate(_items(self.raw, "models", ""))
            ]
            if self.base_model is not None and all(s.reference != self.base_model for s in sources):
                sources.append(_Source(self.base_model, None, {}, "base_model"))
            return [self._slice(sources, self.base_model, {}, "models")]
        return [self._out_slice(item, f"slices.{i}") for i, item in enumerate(_items(self.raw, "slices", ""))]

    def _out_slice(self, item: Any, where: str) -> _Slice:
        _check_keys(item, ("sources", "base_model", "parameters"), where)
        sources = [
            self._source(source, f"{where}.sources.{j}", ("model", "layer_range", "parameters"))
            for j, source in enumerate(_items(item, "sources", where))
        ]
        lengths = {s.layers[1] - s.layers[0] for s in sources if s.layers}
        if len(lengths) > 1:
            raise ConfigError(
                f"{where}: its sources have {sorted(lengths)} layers; ranges of one slice must be equally long."
            )
        base = item.get("base_model")
        reference = self.base_model if base is None else _reference(base, f"{where}.base_model")
        return self._slice(sources, reference, self._scope(item, where), where)

    def _source(self, item: Any, where: str, keys: Sequence[str]) -> _Source:
        _check_keys(item, keys, where)
        if "model" not in item:
            raise ConfigError(f"{where}: the key 'model' is missing.")
        layers = None
        if "layer_range" in keys:
            layers = item.get("layer_range")
            if not (isinstance(layers, list) and len(layers) == 2 and all(type(v) is int for v in layers)):
                raise ConfigError(
                    f"{where}.layer_range = {layers!r}: give the first layer and the one after the last, as [0, 16]."
                )
            layers = (layers[0], layers[1])
        return _Source(_reference(item["model"], f"{where}.model"), layers, self._scope(item, where), where)

    def _slice(
        self, sources: Sequence[_Source], base: str | dict[str, Any] | None, parameters: Mapping[str, Any], where: str
    ) -> _Slice:
        for i, source in enumerate(sources):
            if any(source.reference == other.reference for other in sources[:i]):
                raise ConfigError(
                    f"{source.where}: {_text(source.reference)} is there twice; models merged with each other must differ."
                )
        found = next((s for s in sources if s.reference == base), None) if self.method.base != "ignored" else None
        if found is None and (self.method.base == "required" or (self.method.base == "optional" and base is not None)):
            wanted = "base_model is missing" if base is None else f"base_model {_text(base)} is not among its sources"
            raise ConfigError(f"{where}: {self.name} needs a base model to start from, but {wanted}.")
        experts = tuple(s for s in sources if s is not found)
        if not experts:
            raise ConfigError(f"{where}: there is no model beside the base; name at least one to merge.")
        return _Slice(found, experts, parameters)

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
        _check_keys(parameters, _KNOWN, f"{where}.parameters".lstrip("."))
        for name in parameters:
            if (
                name not in self.method.parameters
                and name != "int8_mask"
                and not (self.name == "nuslerp" and name in _VECTORS)
            ):
                logger.warning("%s: parameters.%s has no effect on merge_method %s", self.path, name, self.name)
        return parameters

    def _value(self, name: str, parameter: _Parameter, sources: Sequence[_Source | None]) -> Any:
        """A parameter in the forms of `anchors/settings.py`; `sources`: whose it is in each slice, None for one of all models."""
        chains = [self._chain(name, parameter, own, source) for own, source in zip(self.slices, sources, strict=True)]
        if len(chains) == 1:
            return _rendered(chains[0])
        layers = [
            _at(chain, i / (count - 1) if count > 1 else 1.0)
            for chain, own in zip(chains, self.slices, strict=True)
            for count in [_length(own)]
            for i in range(count)
        ]
        before, after = _at(chains[0], 0.0), _at(chains[-1], 0.0)
        if all(chain == before for chain in [*layers, after]):
            return _rendered(before)
        prefix, names = self._names()
        cases = [{"filter": f"{prefix}{i}.*", "value": _rendered(chain)} for i, chain in enumerate(layers)]
        if before != after:
            cases += [{"filter": own, "value": _rendered(before)} for own in names]
        return [*cases, {"value": _rendered(after)}]

    def _chain(self, name: str, parameter: _Parameter, own: _Slice, source: _Source | None) -> _Chain:
        scopes = [(own.parameters, "slice"), (self.parameters, "")]
        if source is not None:
            scopes.insert(0, (source.parameters, source.where))
        chain: list[tuple[str | None, Any]] = []
        for scope, where in scopes:
            for pattern, value in _cases(scope.get(name), f"{where}.parameters.{name}".lstrip("."), parameter.convert):
                self._check_filter(pattern, name)
                chain.append((pattern, value))
                if pattern is None:
                    return tuple(chain)
        if parameter.default is _REQUIRED:
            of = f" of {_text(source.reference)}" if source is not None else ""
            state = "has values with a filter only; add one without" if chain else "is missing"
            raise ConfigError(f"parameters.{name}{of} {state}; {self.name} needs it for every tensor.")
        return (*chain, (None, parameter.convert(parameter.default)))

    def _check_filter(self, pattern: str | None, name: str) -> None:
        if pattern is None:
            return
        if _GLOBS & set(pattern):
            raise ConfigError(
                f"parameters.{name}: the filter {pattern!r} is taken to the letter by mergekit and matches nothing; write the part of the name."
            )
        if any(c.isdigit() for c in pattern) and self._renumbers():
            raise ConfigError(
                f"parameters.{name}: the filter {pattern!r} names a layer, and slices number layers anew; give the parameter to the slice."
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
        for name, default in _VECTORS.items():
            value = self._value(name, _switch(name, default), [None] * len(self.slices))
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
                    raise ConfigError(f"{key} = {value!r}: it must be float32, bfloat16, float16 or float64.")
                return name
        return None

    def _same_tokenizer(self) -> bool:
        """Whether a tokenizer is asked for. Only one that all models share can be given, which leaves the embeddings as they are."""
        if self.raw.get("chat_template"):
            raise ConfigError(
                "chat_template: tokenizer files are copied from the base as they are; remove the key, and edit the output's template."
            )
        source, key = self.raw.get("tokenizer_source"), "tokenizer_source"
        if (tokenizer := self.raw.get("tokenizer")) is not None:
            if source is not None:
                raise ConfigError("tokenizer_source and tokenizer exclude each other.")
            _check_keys(tokenizer, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
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
            wanted = _reference(source, key)
            merged = [s.reference for own in self.slices for s in (own.base, *own.experts) if s is not None]
            if wanted not in (*merged, self.base_model):
                raise ConfigError(f"{key}: {_text(wanted)} is none of the models merged; name one of them, or base.")
        return True


def _reference(value: Any, where: str) -> str | dict[str, Any]:
    """`path`, `path@revision`, `path+lora`, `{model: ..., lora: ...}`, as a recipe has it."""
    if isinstance(value, str):
        model, *loras = value.split("+")
        if len(loras) > 1:
            raise ConfigError(f"{where} = {value!r}: more than one '+'; write {{model: ..., lora: ...}}.")
        value = {"model": model, "lora": loras[0] if loras else None}
    _check_keys(value, ("model", "lora", "override_architecture"), where)
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
        _check_keys(value, ("path", "revision"), where)
        path, revision = value.get("path"), value.get("revision")
    else:
        path, _, revision = str(value).partition("@")
    if not isinstance(path, str) or not path or (revision and "@" in revision):
        raise ConfigError(f"{where} = {value!r}: write a path, path@revision, or {{path: ..., revision: ...}}.")
    return path, revision or None


def _text(reference: str | Mapping[str, Any]) -> str:
    if isinstance(reference, str):
        return repr(reference)
    return repr("+".join(str(reference[key]) for key in ("model", "adapter") if key in reference))


def _items(value: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{where}.{key} = {found!r}: it must be a list.".lstrip("."))
    return found


def _check_keys(value: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} = {value!r}: it must be a mapping with {', '.join(known)}.")
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}."
            raise ConfigError(f"unknown key {f'{where}.{key}'.lstrip('.')!r}; {hint}")


def _cases(setting: Any, where: str, convert: Callable[[Any], Any]) -> Iterator[tuple[str | None, Any]]:
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
        _check_keys(case, ("filter", "value"), where)
        if "value" not in case:
            raise ConfigError(f"{where}: {dict(case)!r} has no value.")
        pattern = case.get("filter")
        yield (None if pattern in (None, "*") else str(pattern)), _scalars(case["value"], where, convert)


def _scalars(value: Any, where: str, convert: Callable[[Any], Any]) -> Any:
    """One value, or a gradient."""
    try:
        if isinstance(value, list):
            return _Gradient(tuple(convert(item) for item in value))
        return convert(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} = {value!r}: {error}.") from error


def _at(chain: _Chain, t: float) -> _Chain:
    return tuple((pattern, value.at(t) if isinstance(value, _Gradient) else value) for pattern, value in chain)


def _rendered(chain: _Chain) -> Any:
    plain = [
        (pattern, {"gradient": list(value.values)} if isinstance(value, _Gradient) else value)
        for pattern, value in chain
    ]
    if len(plain) == 1:
        return plain[0][1]
    return [{"value": value} if pattern is None else {"filter": pattern, "value": value} for pattern, value in plain]


def _length(own: _Slice) -> int:
    start, stop = own.experts[0].layers or (0, 0)
    return stop - start

"""What a merging rule is: a pure function of (base, experts) with its scope, its paper, and its parameters.

    @anchor(scope="tensor", paper="...", elementwise=True)
    def name(base, experts, *, weight: PerExpert[float] = each(1.0), scaling: float = 1.0): ...

Its keyword-only arguments, their annotations and defaults, are its schema: recipes, the command line and the documentation follow from it.
A `PerExpert` one arrives as a tuple with a value for each expert. Two names are reserved: a rule that has `site` gets the `Site` it works at, and
`state` is what its `reduce` returned.

Scopes:
* `tensor`: any float tensor by itself.
* `module`: the (out, in) weight of a linear module; `others` says what every other tensor gets: the "mean" of the experts, "scaled" (the base
  plus `scaling` times the mean task vector), "base", or "first" (the first expert's, whose checkpoint the output then is: the host).
* `model`: `reduce(model) -> state` sees the whole model first, pass by pass (thresholds, norms); then the rule is applied to any tensor.

An `elementwise` rule may get a run of whole rows at a time (`site.first` counts from the tensor's start; a vector comes whole); one that is so
only for some of its options says which by a function of its parameters; so does one whose options decide what it reads beside the weights
(`needs`). Tensors come widened to float32 (float64 if
the model has any), or, for a `stored` rule, as they are stored, in any mix of float dtypes: it must compute in float32 or better. A rule must
not write into what it gets, nor depend on any other state: it runs on several threads.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any, Literal, Protocol, TypeVar, get_args, get_origin

import torch
from torch import Tensor

from bmm_engine.anchors.settings import PER_EXPERT, DepthMap, Each, Setting
from bmm_engine.errors import ConfigError, shown

Scope = Literal["tensor", "module", "model"]
Others = Literal["mean", "scaled", "base", "first"]
# What a rule may read beside the weights; sequential Grams are measured while the experts are merged (`bmm_engine.statistics.sequential_grams`).
Need = Literal["grams", "sequential_grams", "fishers", "sensitivities"]
Needs = frozenset[Need]
GRAMS: Needs = frozenset(("grams", "sequential_grams"))
T = TypeVar("T")
_RESERVED = ("site", "state")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """One tensor of the model, or some rows of it, where a rule is at work.

    `shape`: of the whole tensor; `first`: where the given part starts in it, counted in elements. `linear`: it is the weight of a linear module,
    given as (out, in). `parameters`: the rule's, resolved for this tensor. `grams`: the mean second moments of its inputs (in, in), one for each
    expert, for rules that need them; `fishers`: diagonal Fisher information of the experts, of the tensor's own shape; `sensitivities`: the mean
    of J^T J (out, out), J the derivative of an expert's logits by the module's output. `low_rank`: the task vectors that are known as products
    (LoRA), else None. `diagnostics`: a rule that gets its tensors whole may put numbers there, by name, for the merge's record.
    """

    name: str
    base: Tensor
    experts: Sequence[Tensor]
    parameters: Mapping[str, Any]
    shape: tuple[int, ...]
    first: int = 0
    linear: bool = False
    grams: Sequence[Any] = ()
    fishers: Sequence[Tensor] = ()
    sensitivities: Sequence[Tensor] = ()
    low_rank: Sequence[Any] = ()
    diagnostics: dict[str, float] = field(default_factory=dict)

    def seed(self, seed: int, expert: int) -> int:
        """A 64-bit seed of its own for each (seed, tensor, expert), whatever the order in which tensors are done."""
        digest = hashlib.blake2b(f"{seed}\0{self.name}\0{expert}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


class Model(Protocol):
    """What a reduction sees."""

    def sites(self) -> Iterator[Site]:
        """Start a new pass over all merged tensors, in the model's order, in parts where the rule is elementwise."""
        ...

    def map(self, function: Callable[[Site], T]) -> Iterator[T]:
        """`function` of every site of a new pass, in the model's order; several at a time, each on one thread."""
        ...

    def constant(self, parameter: str) -> Any:
        """The value of a parameter that the reduction needs to be one for all tensors. Raises `ConfigError` if it varies."""
        ...


@dataclass(frozen=True)
class Parameters:
    """A rule's parameters as given, checked; `at` resolves them for one tensor."""

    rule: str
    settings: Mapping[str, Setting]

    def at(self, name: str, depth: float, experts: int) -> dict[str, Any]:
        return {key: setting.at(name, depth, experts) for key, setting in self.settings.items()}

    def constant(self, parameter: str, names: Sequence[str], depth: DepthMap, experts: int) -> Any:
        setting = self.settings[parameter]
        first = setting.at(names[0], depth(names[0]), experts) if names else setting.at("", 0.0, experts)
        for name in names:
            if (found := setting.at(name, depth(name), experts)) != first:
                raise ConfigError(
                    f"anchor {self.rule!r}: {parameter} is {first} for {names[0]!r} and {found} for {shown(name)}, but here it is decided over the"
                    " whole model; give one value for all tensors."
                )
        return first

    def choices(self) -> Iterator[dict[str, Any]]:
        """Every combination of words and switches that may hold for a tensor; of numbers the first, which choose nothing."""
        found = {}
        for key, setting in self.settings.items():
            values = setting.values()
            found[key] = list(dict.fromkeys(values)) if any(isinstance(v, (str, bool)) for v in values) else values[:1]
        return (dict(zip(found, chosen, strict=True)) for chosen in product(*found.values()))


@dataclass(frozen=True)
class Anchor:
    """A registered rule; call it on tensors as a function: `rule(base, experts, **parameters)`."""

    name: str
    rule: Callable[..., Tensor]
    scope: Scope
    paper: str
    elementwise: bool | Callable[[Mapping[str, Any]], bool] = False
    stored: bool = False
    symmetric: bool = True
    others: Others = "mean"
    needs: Needs | Callable[[Mapping[str, Any]], Iterable[Need]] = frozenset()
    experts: tuple[int, int | None] = (1, None)
    reduce: Callable[[Model], Any] | None = None
    linear: bool = False
    _keywords: Mapping[str, inspect.Parameter] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        signature = inspect.signature(self.rule, eval_str=True)
        keywords = {p.name: p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
        object.__setattr__(self, "_keywords", keywords)

    def needs_of(self, parameters: Parameters | Mapping[str, Any] | None = None) -> Needs:
        """What the rule reads beside the weights, somewhere in the model, with these parameters (those not given at their defaults)."""
        if not callable(self.needs):
            return self.needs
        resolved = parameters if isinstance(parameters, Parameters) else self.parameters(parameters)
        return frozenset(need for chosen in resolved.choices() for need in self.needs(chosen))

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.rule) or "").split("\n")[0]

    @cached_property
    def _fields(self) -> dict[str, tuple[Any, bool, Any]]:
        """Parameter -> (type of one value, is per expert, default)."""
        fields = {}
        for name, parameter in self._keywords.items():
            if name in _RESERVED:
                continue
            annotation, per_expert = parameter.annotation, False
            if PER_EXPERT in getattr(annotation, "__metadata__", ()):
                per_expert = True
                sequence = get_args(annotation)[0]
                annotation = get_args(sequence)[0]
            default = parameter.default.value if isinstance(parameter.default, Each) else parameter.default
            fields[name] = (annotation, per_expert, default)
        return fields

    @cached_property
    def _checks(self) -> dict[str, Callable[[Any], Any]]:
        from pydantic import TypeAdapter, ValidationError

        def checker(annotation: Any) -> Callable[[Any], Any]:
            adapter = TypeAdapter(annotation)

            def check(value: Any) -> Any:
                try:
                    return adapter.validate_python(value)
                except ValidationError as error:
                    raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None

            return check

        return {name: checker(annotation) for name, (annotation, _, _) in self._fields.items()}

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: default for name, (_, _, default) in self._fields.items()}

    @property
    def schema(self) -> list[dict[str, Any]]:
        """For tables and documentation: name, type, whether it is per expert, default."""
        return [
            {"name": name, "type": _type_name(annotation), "per_expert": per_expert, "default": default}
            for name, (annotation, per_expert, default) in self._fields.items()
        ]

    def parameters(self, given: Mapping[str, Any] | None = None) -> Parameters:
        """The rule's parameters, the `given` ones checked and the others at their defaults. Raises `ConfigError`."""
        given = dict(given or {})
        for key in list(given):
            if key.removesuffix("s") in self._fields and key not in self._fields and self._fields[key[:-1]][1]:
                given[key[:-1]] = given.pop(key)  # a list for the experts may be named in the plural: weights
            elif key not in self._fields:
                close = difflib.get_close_matches(key, self._fields, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"it takes: {', '.join(self._fields) or 'none'}."
                raise ConfigError(f"anchor {self.name!r} has no parameter {key!r}; {hint}")
        settings = {}
        for key, (_, per_expert, default) in self._fields.items():
            raw = given.get(key)
            settings[key] = Setting(
                Each(default) if raw is None else raw,
                where=f"anchor {self.name!r}: {key}",
                check=self._checks[key],
                default=default,
                per_expert=per_expert,
            )
        return Parameters(self.name, settings)

    def takes_parts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether the rule, with the parameters that hold for a tensor, may get it in runs of rows."""
        return self.elementwise(parameters) if callable(self.elementwise) else self.elementwise

    def check_experts(self, count: int) -> None:
        """Raise `ConfigError` unless the rule takes so many experts."""
        least, most = self.experts
        if count < least or (most is not None and count > most):
            wanted = (
                f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            )
            raise ConfigError(f"anchor {self.name!r} merges {wanted} experts beside the base, not {count}.")

    def apply(self, site: Site, state: Any = None) -> Tensor:
        """The merged tensor at `site`: what the engine calls."""
        extra = {name: value for name, value in (("site", site), ("state", state)) if name in self._keywords}
        return self.rule(site.base, site.experts, **site.parameters, **extra)

    def __call__(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        grams: Sequence[Any] = (),
        fishers: Sequence[Tensor] = (),
        sensitivities: Sequence[Tensor] = (),
        low_rank: Sequence[Any] = (),
        name: str = "tensor",
        linear: bool | None = None,
        **parameters: Any,
    ) -> Tensor:
        """Merge one tensor, as if it were the whole model. `linear`: whether it is a linear module's weight (a matrix is, by default)."""
        experts = list(experts)
        self.check_experts(len(experts))
        if not self.stored:
            wide = torch.float64 if torch.float64 in {t.dtype for t in (base, *experts)} else torch.float32
            base, experts = base.to(wide), [e.to(wide) for e in experts]
        resolved = self.parameters(parameters).at(name, 0.0, len(experts))
        linear = base.dim() == 2 if linear is None else linear
        measured = (grams, fishers, sensitivities, low_rank)
        site = Site(name, base, experts, resolved, tuple(base.shape), 0, linear, *measured)
        state = self.reduce(_OneTensor(site)) if self.reduce is not None else None
        return self.apply(site, state)


class _OneTensor:
    """A model of one tensor."""

    def __init__(self, site: Site):
        self.site = site

    def sites(self) -> Iterator[Site]:
        yield self.site

    def map(self, function: Callable[[Site], T]) -> Iterator[T]:
        yield function(self.site)

    def constant(self, parameter: str) -> Any:
        return self.site.parameters[parameter]


_registry: dict[str, Anchor] = {}


def anchor(
    *,
    scope: Scope,
    paper: str,
    elementwise: bool | Callable[[Mapping[str, Any]], bool] = False,
    stored: bool = False,
    symmetric: bool = True,
    others: Others = "mean",
    needs: Need | Iterable[Need] | Callable[[Mapping[str, Any]], Iterable[Need]] = (),
    experts: tuple[int, int | None] = (1, None),
    reduce: Callable[[Model], Any] | None = None,
    linear: bool = False,
) -> Callable[[Callable[..., Tensor]], Anchor]:
    """Register the decorated function as the rule of its name.

    `symmetric`: the order of the experts does not matter (they are then handed over in an order of their contents, so that it does not matter
    to the last bit). `needs`: what it reads beside the weights, one name or several, or a function of its parameters that gives them. `experts`:
    how many it takes, least and most. `linear`: it treats the weights of linear modules apart, and gets them whole, as (out, in), with
    `site.linear` set (a rule of module scope always does).
    Raises `ConfigError` for a rule that contradicts itself or whose name is taken by another function.
    """

    def register(rule: Callable[..., Tensor]) -> Anchor:
        name = rule.__name__
        if (scope == "model") != (reduce is not None):
            raise ConfigError(f"anchor {shown(name)}: a rule has a `reduce` exactly if its scope is 'model'.")
        known = _registry.get(name)
        if known is not None and (known.rule.__module__, known.rule.__qualname__) != (
            rule.__module__,
            rule.__qualname__,
        ):
            raise ConfigError(
                f"anchor {shown(name)} is already registered by {known.rule.__module__}; choose another name."
            )
        apart = linear or scope == "module"
        needed = needs if callable(needs) else frozenset((needs,) if isinstance(needs, str) else needs)
        if not callable(needed) and (unknown := sorted(needed - set(get_args(Need)))):
            raise ConfigError(
                f"anchor {shown(name)}: what it needs, {shown(unknown[0])}, is not one of {', '.join(get_args(Need))}."
            )
        made = Anchor(name, rule, scope, paper, elementwise, stored, symmetric, others, needed, experts, reduce, apart)
        lacking = [key for key, (_, _, default) in made._fields.items() if default is inspect.Parameter.empty]
        if lacking:
            raise ConfigError(f"anchor {shown(name)}: its parameter {shown(lacking[0])} has no default; give one.")
        _registry[name] = made
        return made

    return register


def registered_anchors() -> dict[str, Anchor]:
    """All rules by name, sorted, those of installed plugins included."""
    load_plugins()
    return dict(sorted(_registry.items()))


def get_anchor(name: str) -> Anchor:
    """The rule called `name`. Raises `ConfigError` with the nearest name."""
    if name not in _registry:
        load_plugins()
    if name not in _registry:
        close = difflib.get_close_matches(name, _registry, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(sorted(_registry))}."
        raise ConfigError(f"there is no anchor {shown(name)}; {hint}")
    return _registry[name]


_plugins_loaded = False


def load_plugins() -> None:
    """Import the entry points of the group `bmm_engine.anchors`, once. One that fails is logged, and its rules are not there."""
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    from importlib.metadata import entry_points

    for point in entry_points(group="bmm_engine.anchors"):
        try:
            point.load()
        except Exception as error:  # a broken plugin must not take the other rules with it
            logger.warning(
                "the plugin %s (%s) does not load: %s: %s", point.name, point.value, type(error).__name__, error
            )


def _type_name(annotation: Any) -> str:
    """`float`, `'sum' | 'count'`: a type as a person writes it, without its constraints."""
    if get_origin(annotation) is Literal:
        return " | ".join(repr(choice) for choice in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Mapping:
        return "mapping"
    if args := [a for a in get_args(annotation) if a is not type(None)]:
        return " | ".join(_type_name(a) for a in args)
    return getattr(annotation, "__name__", str(annotation))

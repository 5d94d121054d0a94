"""What a PEFT adapter changes in its base, found from the names and shapes alone; no tensor is read."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bmm_engine.checkpoint.adapter_config import MERGE_REMEDY, LoraSettings
from bmm_engine.checkpoint.adapter_names import known_names, match_names, sort_keys
from bmm_engine.checkpoint.source import TensorSource, TensorSpec
from bmm_engine.errors import CheckpointError, MissingTensorError, ShapeMismatchError


@dataclass(frozen=True)
class Delta:
    """What changes one weight: the keys of its factors. `transposed`: the base stores the weight as (in, out), so the change is `(B A)^T`."""

    a: str
    b: str
    scaling: float
    magnitude: str | None
    embedding: bool
    transposed: bool


@dataclass(frozen=True)
class Changes:
    """By the base's names. `saved`: key of the tensor in the place of the base's. `biases`: key of what is added, times the scaling."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    biases: dict[str, tuple[str, float]] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.deltas or name in self.saved or name in self.biases


def find_changes(
    base: TensorSource,
    specs: Mapping[str, TensorSpec],
    settings: LoraSettings,
    label: str,
    live_names: Mapping[str, str],
    transposed: Collection[str] | None,
) -> Changes:
    """`specs`: by the keys of the adapter's file; the rest, and errors: see `AdapterSource`."""
    parts, saved = sort_keys(specs, label)
    known = known_names(base, live_names)
    wanted = [f"{module}.{kind}" for module in parts for kind in ("weight", "bias")]
    base_names = match_names([*wanted, *saved], known)
    flipped = None if transposed is None else set(match_names(transposed, known).values())
    finder = _Finder(base, specs, settings, label, base_names)
    finder.find_saved(saved)
    finder.find_deltas(parts, flipped)
    return finder.changes


def stored_spec(name: str, base: TensorSource, specs: Mapping[str, TensorSpec], saved: Mapping[str, str]) -> TensorSpec:
    """Of the tensor that the factors are added to: the base's, or what the adapter has in its place."""
    return specs[saved[name]] if name in saved else base.spec(name)


class _Finder:
    """`base_names`: name in the adapter -> name in the base, for those that the base has."""

    def __init__(
        self,
        base: TensorSource,
        specs: Mapping[str, TensorSpec],
        settings: LoraSettings,
        label: str,
        base_names: Mapping[str, str],
    ):
        self.base, self.specs, self.settings, self.label = base, specs, settings, label
        self.base_names = base_names
        self.changes = Changes()

    def find_saved(self, saved: Mapping[str, str]) -> None:
        """`saved`: name of a whole tensor -> key."""
        found = self.changes.saved
        for name, key in saved.items():
            target = self.base_names.get(name)
            if target is None and not self.settings.saves(name):
                raise self._missing([name], "trains tensors")
            if found.setdefault(target or name, key) != key:
                raise self._twice(found[target or name], key, target or name)

    def find_deltas(self, parts: Mapping[str, dict[str, str]], flipped: set[str] | None) -> None:
        """`parts`: module -> its keys by part. `flipped`: the weights that are stored as (in, out), where that is known."""
        missing = [weight for module in parts if (weight := f"{module}.weight") not in self.base_names]
        if missing:
            raise self._missing(missing, "adapts modules")
        square: list[str] = []
        fan_in_fan_out_is_wrong = False
        for module, keys in parts.items():
            name = self.base_names[f"{module}.weight"]
            delta = self._delta(module, keys)
            orientations = self._orientations(module, name, delta)
            transposed = orientations[0]
            if len(orientations) == 2:
                transposed = self.settings.fan_in_fan_out
                square.append(name)
            elif not delta.embedding and len(self._stored_spec(name).shape) == 2:
                fan_in_fan_out_is_wrong |= transposed != self.settings.fan_in_fan_out
            if flipped is not None and not delta.embedding:
                transposed = name in flipped
                if transposed not in orientations:
                    raise self._misfit(module, name, delta)
            if name in self.changes.deltas:
                raise self._twice(self.changes.deltas[name].a, delta.a, name)
            self.changes.deltas[name] = replace(delta, transposed=transposed)
            if "lora_B.bias" in keys:
                self._add_bias(module, keys["lora_B.bias"], delta.scaling)
        if square and fan_in_fan_out_is_wrong and flipped is None:
            raise CheckpointError(
                f"{self.label}: fan_in_fan_out={self.settings.fan_in_fan_out} in {self.settings.path} does not fit all"
                f" adapted weights, and for the square {square[0]!r} the shape does not tell how it is stored; "
                f"{MERGE_REMEDY}, or say which weights are stored as (in, out): transposed=[...]"
            )

    def _delta(self, module: str, keys: Mapping[str, str]) -> Delta:
        embedding = "lora_embedding_A" in keys or "lora_embedding_B" in keys
        pair = [f"lora_{'embedding_' if embedding else ''}{letter}" for letter in "AB"]
        lacking = [part for part in pair if part not in keys]
        if self.settings.dora and "lora_magnitude_vector" not in keys:
            lacking.append("lora_magnitude_vector")
        if lacking:
            raise CheckpointError(
                f"{self.label}: module {module!r} has {', '.join(sorted(keys))}, but no {', '.join(lacking)}; save the adapter"
                " again or download it again"
            )
        if not self.settings.dora and "lora_magnitude_vector" in keys:
            raise CheckpointError(
                f"{self.label}: module {module!r} has a lora_magnitude_vector, but use_dora is not set in"
                f" {self.settings.path}; correct the config or download the adapter again"
            )
        scaling = self.settings.scaling(module)
        return Delta(keys[pair[0]], keys[pair[1]], scaling, keys.get("lora_magnitude_vector"), embedding, embedding)

    def _orientations(self, module: str, name: str, delta: Delta) -> tuple[bool, ...]:
        """The values of `transposed` that fit the shapes: two for a square weight. Raises for none, and for a base that is quantised."""
        a, b = self._shape(delta.a), self._shape(delta.b)
        spec = self._stored_spec(name)
        for key in filter(None, (delta.a, delta.b, delta.magnitude)):
            self._check_stored_as_floats(key)
        if not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
            raise CheckpointError(
                f"{self.label}: {name!r} is {spec.dtype} in {self.base.label}; an adapter cannot be added to quantised weights:"
                " pass the original floating-point base"
            )
        rank = self.settings.rank_of(module)
        if min(len(a), len(b)) < 2 or (a[0], b[1]) != (rank, rank):
            raise ShapeMismatchError(
                f"{self.label}: module {module!r} has A {a} and B {b}, but rank {rank} by {self.settings.path}: A is (r, in), B is"
                " (out, r). Correct r or rank_pattern, or download the adapter again"
            )
        fits = []
        if delta.embedding:
            fits = [True] if spec.shape == (a[1], b[0]) and len(a) == len(b) == 2 else []
        elif len(spec.shape) == 2 == len(a) == len(b):
            fits = [flip for flip in (False, True) if spec.shape == ((a[1], b[0]) if flip else (b[0], a[1]))]
        elif len(spec.shape) == len(a) == len(b) and (b[0], *a[1:]) == spec.shape and math.prod(b[2:]) == 1:
            fits = [False]  # a convolution without groups
        if not fits:
            raise self._misfit(module, name, delta)
        if delta.magnitude is not None and math.prod(self._shape(delta.magnitude)) != b[0]:
            raise ShapeMismatchError(
                f"{self.label}: module {module!r} has B {b}, but a magnitude of shape {self._shape(delta.magnitude)}; it needs"
                f" {b[0]} entries. Download the adapter again"
            )
        return tuple(fits)

    def _add_bias(self, module: str, key: str, scaling: float) -> None:
        name = self.base_names.get(f"{module}.bias")
        if name is None:
            raise CheckpointError(
                f"{self.label}: module {module!r} has a lora_B.bias, but the base {self.base.label} has no bias there that it"
                " could be added to; train it without lora_bias, or give the base zero biases"
            )
        if self._shape(key) != self._stored_spec(name).shape:
            raise ShapeMismatchError(
                f"{self.label}: {key!r} has shape {self._shape(key)}, {name!r} in {self.base.label}"
                f" {self._stored_spec(name).shape}; use the base that the adapter was trained on"
            )
        self._check_stored_as_floats(key)
        self.changes.biases[name] = (key, scaling)

    def _check_stored_as_floats(self, key: str) -> None:
        dtype = self.specs[key].dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise CheckpointError(
                f"{self.label}: {key!r} is {dtype}, which is no factor as it was trained but a quantised one; save the adapter in float32 or bfloat16"
            )

    def _stored_spec(self, name: str) -> TensorSpec:
        return stored_spec(name, self.base, self.specs, self.changes.saved)

    def _shape(self, key: str) -> tuple[int, ...]:
        return self.specs[key].shape

    def _missing(self, names: Sequence[str], what: str) -> MissingTensorError:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        close = difflib.get_close_matches(names[0], self.base.names(), n=3)
        hint = f"; the nearest names there are {', '.join(map(repr, close))}" if close else ""
        trained_on = f", whose config names {self.settings.trained_on!r}" if self.settings.trained_on else ""
        return MissingTensorError(
            f"{self.label}: {what} that the base {self.base.label} does not have: {names[0]!r}{more}{hint}. Pass the base of this"
            f" adapter{trained_on}, or {MERGE_REMEDY}"
        )

    def _twice(self, first: str, second: str, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.label}: {first!r} and {second!r} both mean {name!r} of {self.base.label}; {MERGE_REMEDY}"
        )

    def _misfit(self, module: str, name: str, delta: Delta) -> ShapeMismatchError:
        return ShapeMismatchError(
            f"{self.label}: module {module!r} has A {self._shape(delta.a)} and B {self._shape(delta.b)}, which do not fit {name!r} of"
            f" shape {self._stored_spec(name).shape} in {self.base.label}; use the base that the adapter was trained on, or {MERGE_REMEDY}"
        )

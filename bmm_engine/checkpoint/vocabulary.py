"""Embeddings and output heads of another number of rows: cropped to the fewest, or padded to the most."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from bmm_engine.checkpoint.source import TensorSource, TensorSpec, row_span
from bmm_engine.checkpoint.tokens import Union

_NAMES = re.compile(r"embed|(^|\.)(lm_head|wte|shared|decoder|word_embeddings)(\.|$)")
# `(name, start, stop)` -> the rows that a source lacks.
Fill = Callable[[str, int, int], torch.Tensor]


@dataclass(frozen=True)
class Reader:
    """A source, and its name for each of the base's tensors."""

    source: TensorSource
    names: Mapping[str, str]

    def rows(self, name: str) -> int:
        return self.source.spec(self.names[name]).shape[0]


def is_vocabulary_tensor(source: TensorSource, name: str) -> bool:
    """Whether dimension 0 of a matrix or vector counts tokens: it is the config's `vocab_size`, or, without one, the name tells."""
    shape = source.spec(name).shape
    if len(shape) not in (1, 2):
        return False
    size = _vocab_size(source.config)
    return bool(_NAMES.search(name)) if size is None else shape[0] == size


def fit_vocabulary(
    base: TensorSource, experts: Sequence[Reader], names: Sequence[str], mode: str
) -> tuple[TensorSource, list[TensorSource]]:
    """Views of base and experts that agree in the rows of the tensors `names` (the base's names).

    `mode` "crop": the first rows, as many as all have. "pad": as many as any has; a row that the base lacks is the mean of the experts' that
    have it, a row that an expert lacks is the base's, so that its task vector is zero there. Nothing is read before it is asked for.
    """
    choose = min if mode == "crop" else max
    rows = {n: choose([base.spec(n).shape[0], *(e.rows(n) for e in experts)]) for n in names}

    def mean(name: str, start: int, stop: int) -> torch.Tensor:
        return _mean_of_present(experts, name, start, stop)

    fitted = ResizedSource(base, rows, fill=mean)
    views: list[TensorSource] = []
    for expert in experts:
        base_names = {expert.names[n]: n for n in names}
        views.append(
            ResizedSource(
                expert.source,
                {expert.names[n]: count for n, count in rows.items()},
                fill=lambda name, start, stop, own=base_names: fitted.load(own[name], slice(start, stop)),  # type: ignore[misc]
                # A dtype that holds both the expert's rows and the base's, or the task vector of a filled row would not be zero.
                dtypes={expert.names[n]: base.spec(n).dtype for n in names},
            )
        )
    return fitted, views


class ViewOfRows(TensorSource):
    """A source with other rows in some tensors. `tokenizer`: that of the output, where it is not the base's."""

    def __init__(self, source: TensorSource):
        self.source = source
        self.label = source.label
        self.tokenizer: Union | None = None

    @property
    def inputs(self) -> tuple[TensorSource, ...]:
        return (self.source,)

    def names(self) -> tuple[str, ...]:
        return self.source.names()

    def __contains__(self, name: object) -> bool:
        return name in self.source

    @property
    def aliases(self) -> dict[str, str]:
        return self.source.aliases

    def _key(self, name: str, among: Collection[str]) -> str | None:
        """Under which name the rows of `name` are given: its own, or that of the tensor which holds its data."""
        if name in among:
            return name
        if not among:
            return None
        held = self.source.aliases.get(name)
        return held if held in among else None


class ResizedSource(ViewOfRows):
    """`source` with another number of rows in some tensors, by `rows`; `fill` gives those that it lacks."""

    def __init__(
        self,
        source: TensorSource,
        rows: Mapping[str, int],
        *,
        fill: Fill,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ):
        super().__init__(source)
        self._rows = dict(rows)
        self._fill = fill
        self._dtypes = dict(dtypes or {})

    def spec(self, name: str) -> TensorSpec:
        spec, key = self.source.spec(name), self._key(name, self._rows)
        if key is None:
            return spec
        dtype = spec.dtype
        if key in self._dtypes and self._rows[key] > spec.shape[0]:
            dtype = torch.promote_types(dtype, self._dtypes[key])
        return replace(spec, shape=(self._rows[key], *spec.shape[1:]), dtype=dtype)

    def load(self, name: str, rows: slice | None = None) -> torch.Tensor:
        key = self._key(name, self._rows)
        if key is None:
            return self.source.load(name, rows)
        spec, present = self.spec(name), self.source.spec(name).shape[0]
        start, stop = row_span(name, spec.shape, rows)
        out = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        held = max(0, min(stop, present) - start)
        if held:
            out[:held] = self.source.load(name, slice(start, start + held))
        if held < stop - start:
            out[held:] = self._fill(key, start + held, stop)
        return out

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The source's, with its `vocab_size` true to the rows."""
        return with_vocab_size(self.source.config, set(self._rows.values()))


def config_of_rows(base: TensorSource, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The config of a base some of whose tensors are replaced by others of `shapes`: its `vocab_size` is that of its embeddings."""
    rows = {
        shape[0]
        for name, shape in shapes.items()
        if is_vocabulary_tensor(base, name) and shape[1:] == base.spec(name).shape[1:]
    }
    return with_vocab_size(base.config, rows)


def with_vocab_size(config: dict[str, Any] | None, rows: set[int]) -> dict[str, Any] | None:
    """The config with that number of tokens; as it is where there is not one number."""
    old = _vocab_size(config)
    if config is None or old is None or len(rows) != 1 or rows == {old}:
        return config
    found: dict[str, Any] = copy.deepcopy(config)
    for part in (found, found.get("text_config")):
        if isinstance(part, dict) and part.get("vocab_size") == old:
            part["vocab_size"] = next(iter(rows))
    return found


def _mean_of_present(experts: Sequence[Reader], name: str, start: int, stop: int) -> torch.Tensor:
    """Row by row the mean over the experts that have it, in float64; the order of the experts does not matter."""
    bounds = sorted({start, stop, *(n for e in experts if start < (n := e.rows(name)) < stop)})
    pieces = []
    for low, high in itertools.pairwise(bounds):
        present = [e.source.load(e.names[name], slice(low, high)).double() for e in experts if e.rows(name) >= high]
        pieces.append(torch.stack(present).sort(0).values.mean(0))
    return torch.cat(pieces)


def _vocab_size(config: dict[str, Any] | None) -> int | None:
    for part in (config, (config or {}).get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("vocab_size"), int):
            return int(part["vocab_size"])
    return None

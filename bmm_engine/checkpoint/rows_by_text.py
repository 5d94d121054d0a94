"""Views of base and experts whose embeddings have the same token in every row, matched by the tokens' texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bmm_engine.checkpoint.source import TensorSource, TensorSpec, row_span
from bmm_engine.checkpoint.tokens import Union, Vocabulary
from bmm_engine.checkpoint.vocabulary import Reader, ViewOfRows, with_vocab_size
from bmm_engine.errors import ConfigError


def fit_by_text(
    base: TensorSource,
    experts: Sequence[Reader],
    names: Sequence[str],
    union: Union,
    vocabularies: Sequence[Vocabulary],
) -> tuple[TensorSource, list[TensorSource]]:
    """Views of base and experts in whose tensors `names` (the base's names) row `i` is the token `i` of the `union`.

    A token that the base lacks has there the mean of the experts' rows that have it; one that an expert lacks has the base's, so that its task vector
    is zero there. Rows of no token are the base's own, zero where it has none. `vocabularies`: of base and experts.
    """
    held = [min(source.spec(n).shape[0] for n in own) for source, own in _with_names(base, experts, names)]
    count = max(union.rows, held[0])
    texts = {number: text for text, number in union.numbers.items()}
    maps = [
        _own_rows(texts, own, rows, count, first=i == 0)
        for i, (own, rows) in enumerate(zip(vocabularies, held, strict=True))
    ]

    def of_experts(name: str, rows: Tensor) -> Tensor:
        return _mean_of_present(experts, maps[1:], name, rows)

    fitted = RowsByText(base, names, maps[0], of_experts, tokenizer=union)
    views: list[TensorSource] = []
    for expert, own_rows in zip(experts, maps[1:], strict=True):
        base_names = {expert.names[n]: n for n in names}

        def of_base(name: str, rows: Tensor, own: Mapping[str, str] = base_names) -> Tensor:
            return fitted.load(own[name], slice(int(rows[0]), int(rows[-1]) + 1))[rows - rows[0]]

        dtypes = {expert.names[n]: base.spec(n).dtype for n in names}
        views.append(RowsByText(expert.source, list(base_names), own_rows, of_base, dtypes=dtypes))
    return fitted, views


def _with_names(
    base: TensorSource, experts: Sequence[Reader], names: Sequence[str]
) -> list[tuple[TensorSource, list[str]]]:
    return [(base, list(names)), *((e.source, [e.names[n] for n in names]) for e in experts)]


def _own_rows(texts: Mapping[int, str], own: Vocabulary, held: int, count: int, *, first: bool) -> Tensor:
    """(count,): the model's row of each token of the output, -1 where it has none."""
    rows = torch.full((count,), -1, dtype=torch.long)
    for i in range(count):
        text = texts.get(i)
        row = own.numbers.get(text, -1) if text is not None else i if first else -1
        rows[i] = row if row < held else -1
    return rows


def _mean_of_present(experts: Sequence[Reader], maps: Sequence[Tensor], name: str, rows: Tensor) -> Tensor:
    """Of each row the mean over the experts that have it, in float64; the order of the experts does not matter. Zero where none has it."""
    out = []
    for row in rows.tolist():
        present = [
            e.source.load(e.names[name], slice(int(own[row]), int(own[row]) + 1)).double()
            for e, own in zip(experts, maps, strict=True)
            if own[row] >= 0
        ]
        shape = (1, *experts[0].source.spec(experts[0].names[name]).shape[1:])
        out.append(torch.stack(present).sort(0).values.mean(0) if present else torch.zeros(shape, dtype=torch.float64))
    return torch.cat(out)


_TOKENS = ("input_ids", "decoder_input_ids")


class RowsByText(ViewOfRows):
    """`source` with other rows in the tensors `names`: row `i` is its row `own_rows[i]`, or, where that is -1, what `fill` gives for `i`."""

    def __init__(
        self,
        source: TensorSource,
        names: Sequence[str],
        own_rows: Tensor,
        fill: Callable[[str, Tensor], Tensor],
        *,
        dtypes: Mapping[str, torch.dtype] | None = None,
        tokenizer: Union | None = None,
    ):
        super().__init__(source)
        self._names = frozenset(names)
        self.own_rows = own_rows
        self._fill = fill
        self._dtypes = dict(dtypes or {})
        self.tokenizer = tokenizer

    def spec(self, name: str) -> TensorSpec:
        spec, key = self.source.spec(name), self._key(name, self._names)
        if key is None:
            return spec
        dtype = spec.dtype
        if key in self._dtypes and bool((self.own_rows < 0).any()):
            dtype = torch.promote_types(dtype, self._dtypes[key])
        return replace(spec, shape=(len(self.own_rows), *spec.shape[1:]), dtype=dtype)

    def load(self, name: str, rows: slice | None = None) -> Tensor:
        key = self._key(name, self._names)
        if key is None:
            return self.source.load(name, rows)
        spec = self.spec(name)
        start, stop = row_span(name, spec.shape, rows)
        wanted = self.own_rows[start:stop]
        out = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        held = wanted >= 0
        if held.any():
            low, high = int(wanted[held].min()), int(wanted[held].max())
            out[held] = self.source.load(name, slice(low, high + 1))[wanted[held] - low].to(spec.dtype)
        if not held.all():
            out[~held] = self._fill(key, torch.arange(start, stop)[~held]).to(spec.dtype)
        return out

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The source's, with its `vocab_size` true to the rows."""
        return with_vocab_size(self.source.config, {len(self.own_rows)})


def renumbered(source: TensorSource, batches: Sequence[Any]) -> Sequence[Any]:
    """A model's inputs with its own numbers of tokens, as `source`, which may be a view of its rows, has them. Raises ConfigError for a number that
    is no token there."""
    if not isinstance(source, RowsByText):
        return batches
    kept = source.own_rows
    numbers = torch.full((int(kept.max()) + 1,), -1, dtype=torch.long)
    held = kept >= 0
    numbers[kept[held]] = torch.arange(len(kept))[held]

    def changed(ids: Tensor) -> Tensor:
        known = ids.clamp(0, len(numbers) - 1)
        out = torch.where(ids >= 0, numbers.to(ids.device)[known], ids)
        if bool(((ids >= len(numbers)) | ((ids >= 0) & (out < 0))).any()):
            raise ConfigError(
                f"{source.label}: its calibration data hold the number {int(ids[(ids >= len(numbers)) | (out < 0)][0])}, which is no token of its"
                " tokenizer; the rows of its embeddings are matched by their tokens."
            )
        return out

    return [
        {key: changed(value) if key in _TOKENS and isinstance(value, Tensor) else value for key, value in batch.items()}
        if isinstance(batch, Mapping)
        else batch
        for batch in batches
    ]

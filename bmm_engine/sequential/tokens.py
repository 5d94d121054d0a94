"""Rows weighed by their kind of token: in the last blocks only the one token that a head reads may count in full.

What a classifier reads of the last block is its first token (CLS), what a language model's score reads is the last one; what the block's other rows
come to matters to no one, but for keys and values, which that token attends to (FeatCal, arXiv 2605.13030, which weighs the others 0.01).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bmm_engine.errors import CollectionError
from bmm_engine.models.calling import Padding
from bmm_engine.models.roles import gives_keys
from bmm_engine.sequential.reading import SharedInput


@dataclass(frozen=True)
class TokenRows:
    """The `kind` of token that counts in full, "cls" (the first of a sample that is no padding) or "last"; all others count `weight`."""

    kind: str
    weight: float

    def weights(self, name: str, x: Tensor, padding: Padding | None, samples: int) -> Tensor:
        """Of the rows of module `name`'s input `x` (..., in), leading dimensions flattened, float64. Rows that are no tokens (one for each sample;
        positions, pictures) count alike. Raises `CollectionError` where it cannot be told which they are."""
        shape = x.shape[:-1]
        if padding is None:
            if len(shape) > 2 or not shape or shape[0] != samples:
                raise CollectionError(
                    f"{name}: its input has shape {tuple(x.shape)}, of {samples} samples without a padding mask: which rows are their"
                    f" {self.kind!r} tokens cannot be told. Give a mask, or say token_rows: all."
                )
            padding = Padding((x.new_ones(*shape) if len(shape) == 2 else x.new_ones(samples, 1),))
        chosen = replace(
            padding,
            masks=tuple(map(self._pick, padding.masks)),
            of_features=None if padding.of_features is None else self._of_features(padding),
        ).rows(name, x)
        found = torch.ones(shape.numel(), dtype=torch.float64, device=x.device)
        return found if chosen is None else found.masked_fill_(~chosen, self.weight)

    def _pick(self, mask: Tensor) -> Tensor:
        """Of a mask (samples, length) the one token of each sample."""
        there = mask != 0
        if self.kind == "cls":
            return there & (there.cumsum(-1) == 1)
        return there & (there.flip(-1).cumsum(-1).flip(-1) == 1)

    def _of_features(self, padding: Padding) -> Callable[[int, Tensor], Tensor]:
        features, mask = padding.of_features, padding.masks[0]
        assert features is not None
        return lambda length, chosen: self._pick(features(length, mask))


def apart(found: Sequence[SharedInput]) -> list[SharedInput]:
    """The inputs of a block, those that keys or values and other modules read twice: all rows count for the one, not for the other."""
    parts = []
    for shared in found:
        for keys in (False, True):
            if own := tuple(name for name in shared.modules if gives_keys(name) == keys):
                parts.append(replace(shared, modules=own))
    return parts

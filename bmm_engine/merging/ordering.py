"""An order of the experts that follows from their contents, so that a merge does not depend on the order in which they are listed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor

from bmm_engine.checkpoint import TensorSource
from bmm_engine.checkpoint.safetensors_io import byte_view
from bmm_engine.merging.align import AlignedExpert

# About so much of a tensor is compared first: experts that differ at all nearly always differ in the first rows of some tensor.
PROBE_ELEMENTS = 2**12
BLOCK_ELEMENTS = 2**20


def canonical_order(
    base: TensorSource, experts: Sequence[AlignedExpert], names: Sequence[str], keys: Sequence[object]
) -> tuple[int, ...]:
    """Indices of `experts`, sorted by the hashes of their tensors' values; experts with equal tensors by the text of their `keys`.

    Neither the names of tensors nor their order matter: tensors are taken in the order of the base's hashes. Reads little: the first rows of
    each tensor until all experts are told apart, and only experts equal in all of those in full.
    """
    like: dict[bytes, list[str]] = {}  # names of tensors that are alike in the base
    for name in names:
        like.setdefault(_digest(base, name, False), []).append(name)
    groups: list[list[int]] = [list(range(len(experts)))]
    for whole in (False, True):
        for _, alike in sorted(like.items()):
            if len(groups) == len(experts):
                break
            groups = _split(groups, partial(_digests, experts, alike, whole))
    return tuple(t for group in _split(groups, lambda t: repr(keys[t]).encode()) for t in group)


def _split(groups: Iterable[list[int]], key: Callable[[int], bytes]) -> list[list[int]]:
    """Each group sorted by `key` and cut where it changes."""
    found: list[list[int]] = []
    for group in groups:
        if len(group) == 1:
            found.append(group)
            continue
        keys = {t: key(t) for t in group}
        for value in sorted(set(keys.values())):
            found.append([t for t in group if keys[t] == value])
    return found


def _digests(experts: Sequence[AlignedExpert], names: Sequence[str], whole: bool, t: int) -> bytes:
    return b"".join(sorted(_digest(experts[t], name, whole) for name in names))


def _digest(source: AlignedExpert | TensorSource, name: str, whole: bool) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for block in _blocks(source, name, None if whole else PROBE_ELEMENTS):
        digest.update(byte_view(block.double()))  # the same for the same values in another dtype
    return digest.digest()


def _blocks(source: AlignedExpert | TensorSource, name: str, most: int | None) -> Iterator[Tensor]:
    """The first rows of a tensor, of about `most` elements; or all, in blocks."""
    shape = source.spec(name).shape
    if not shape or not math.prod(shape):
        yield source.load(name)
        return
    step = max(1, (most or BLOCK_ELEMENTS) * shape[0] // math.prod(shape))
    for start in range(0, shape[0] if most is None else min(step, shape[0]), step):
        yield source.load(name, slice(start, start + step))

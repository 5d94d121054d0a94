"""Tensors as vectors: inner products, arcs and linear combinations, in float64, a slab at a time.

The spherical rules all give a linear combination of the experts (or of their task vectors) whose coefficients follow from the vectors' inner
products alone. So two passes do: one for the Gram matrix of the vectors, one for the combination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError

Origin = Literal["zero", "base"]
Vectors = Literal["tensor", "rows", "columns"]

_SLAB = 1 << 18
# From inner products in float64 a sine below about 1e-8 cannot be told from 0; below this one an arc is a straight line to 1e-12.
_NO_ARC = 1e-6
# A sum of unit vectors that is shorter than this, relative to their weights, is rounding errors.
_CANCELLED = 1e-7


def vector_gram(tensors: Sequence[Tensor], origin: Tensor | None, vectors: Vectors = "tensor") -> Tensor:
    """Inner products of the tensors, less `origin`, as vectors: (V, T, T) float64 for T tensors of V vectors each."""
    views = [_as_vectors(t, vectors) for t in tensors]
    start = None if origin is None else _as_vectors(origin, vectors)
    out = views[0].new_zeros((views[0].shape[0], len(views), len(views)), dtype=torch.float64)
    for part in _slabs(views[0]):
        slab = torch.stack([_difference(view, start, part) for view in views], dim=1)  # (V, T, elements)
        out[part[0]] += slab @ slab.mT
    return out


def combine(
    tensors: Sequence[Tensor], origin: Tensor | None, coefficients: Tensor, vectors: Vectors = "tensor"
) -> Tensor:
    """`origin + sum_t c_t (W_t - origin)`, no origin being 0; `coefficients` (V, T) float64. Rounded once to the tensors' dtype."""
    out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    views, result = [_as_vectors(t, vectors) for t in tensors], _as_vectors(out, vectors)
    start = None if origin is None else _as_vectors(origin, vectors)
    for part in _slabs(result):
        total = (
            torch.zeros_like(result[part], dtype=torch.float64)
            if start is None
            else start[part].to(torch.float64, copy=True)
        )
        for view, coefficient in zip(views, coefficients.unbind(1), strict=True):
            total += coefficient[part[0], None] * _difference(view, start, part)
        result[part] = total.to(out.dtype)
    return out


def norms(gram: Tensor) -> Tensor:
    """(V, T) lengths of the vectors."""
    return gram.diagonal(dim1=-2, dim2=-1).sqrt()


def unit_gram(gram: Tensor) -> Tensor:
    """(V, T, T) cosines of the angles between the vectors; 0 where one of them is 0."""
    lengths = norms(gram)
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    return (gram * inverse[..., :, None] * inverse[..., None, :]).clamp_(-1, 1)


def arc(cosine: Tensor, t: float, linear_above: float = 1.0) -> tuple[Tensor, Tensor]:
    """Coefficients of slerp, `sin((1-t) theta) / sin theta` and `sin(t theta) / sin theta`; of shape `cosine`.

    Where `abs(cosine) > linear_above`, or the vectors point the same or opposite ways, they are those of the straight line, `1 - t` and `t`.
    """
    sine = ((1 - cosine) * (1 + cosine)).sqrt()
    theta = torch.atan2(sine, cosine)
    straight = (cosine.abs() > linear_above) | (sine < _NO_ARC)
    sine = torch.where(straight, 1.0, sine)
    first = torch.where(straight, 1 - t, ((1 - t) * theta).sin() / sine)
    second = torch.where(straight, t, (t * theta).sin() / sine)
    return first, second


def interpolate(
    first: Tensor,
    second: Tensor,
    t: float,
    *,
    origin: Tensor | None = None,
    vectors: Vectors = "tensor",
    linear_above: float = 1.0,
) -> Tensor:
    """Slerp of two tensors seen from `origin`, vector by vector; a straight line where one of the two is 0 or there is no arc."""
    gram = vector_gram([first, second], origin, vectors)
    from_first, from_second = arc(unit_gram(gram)[:, 0, 1], t, linear_above)
    undirected = (norms(gram) == 0).any(1)
    from_first, from_second = torch.where(undirected, 1 - t, from_first), torch.where(undirected, t, from_second)
    return combine([first, second], origin, torch.stack([from_first, from_second], dim=1), vectors)


def spherical_mean(
    tensors: Sequence[Tensor],
    origin: Tensor | None,
    shares: Tensor,
    name: str,
    move: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`origin + (sum_t s_t |v_t|) u` of the vectors `v_t = W_t - origin`, no origin being 0; `shares` (T,) float64.

    `move(cosines, lengths, mean)` gives the direction `u` for the mean direction, both as coefficients (T,) of the unit vectors. A zero vector
    has no direction and only counts in the mean length. Two opposite vectors, which have no mean direction, are averaged linearly; raises
    `ConfigError`, naming the tensor, if the directions of more than two cancel out.
    """
    gram = vector_gram(tensors, origin)
    lengths, cosines = norms(gram)[0], unit_gram(gram)[0]
    mean = mean_direction(cosines, lengths, shares, name)
    if mean is None:
        return combine(tensors, origin, shares[None])
    direction = move(cosines, lengths, mean)
    coefficients = (shares @ lengths) * torch.where(lengths > 0, direction / lengths, 0.0)
    return combine(tensors, origin, coefficients[None])


def mean_direction(cosines: Tensor, lengths: Tensor, weights: Tensor, name: str) -> Tensor | None:
    """`m = sum_t w_t u_t / |sum_t w_t u_t|` as its coefficients (T,) of the unit vectors `u_t`.

    None where there is none and the straight line will do: at most two vectors are not 0, and those are opposite. Raises `ConfigError`, naming
    the tensor, if more than two directions cancel out.
    """
    weights = torch.where(lengths > 0, weights, 0.0)
    length = (weights @ cosines @ weights).clamp(min=0).sqrt()
    if float(length) > _CANCELLED * float(weights.abs().sum()):
        return weights / length
    if int((weights != 0).sum()) <= 2:
        return None
    raise ConfigError(
        f"{name}: the directions of its {len(weights)} vectors cancel out with the weights {weights.tolist()}, so they have no mean direction;"
        " change a weight, or merge this tensor by another rule."
    )


def tangent_mean(cosines: Tensor, mean: Tensor, weights: Tensor) -> Tensor:
    """`sum_t w_t log_m(u_t)`, the weighted mean of the logarithms at `m`, as coefficients (T,) of the unit vectors.

    `log_m(u) = theta / sin(theta) (u - cos(theta) m)`. A point opposite to `m` has no logarithm and counts as 0.
    """
    cosine = (cosines @ mean).clamp(-1, 1)
    sine = ((1 - cosine) * (1 + cosine)).sqrt()
    near = sine < _NO_ARC
    stretch = torch.atan2(sine, cosine) / torch.where(near, 1.0, sine)
    stretched = weights * torch.where(near, (cosine > 0).double(), stretch)
    return stretched - (stretched @ cosine) * mean


def exponential(cosines: Tensor, mean: Tensor, tangent: Tensor) -> Tensor:
    """`exp_m(v) = cos|v| m + sin|v| v / |v|`, brought back to length 1; all as coefficients (T,) of the unit vectors."""
    length = (tangent @ cosines @ tangent).clamp(min=0).sqrt()
    point = length.cos() * mean + torch.sinc(length / torch.pi) * tangent
    return point / (point @ cosines @ point).sqrt()


def _as_vectors(tensor: Tensor, vectors: Vectors) -> Tensor:
    """(V, elements). What has fewer than two dimensions is one vector; a row holds all that belongs to one output."""
    if vectors == "tensor" or tensor.dim() < 2:
        return tensor.reshape(1, -1)
    rows = tensor.flatten(1)
    return rows if vectors == "rows" else rows.mT


def _slabs(view: Tensor) -> Iterator[tuple[slice, slice]]:
    rows, length = view.shape
    high = max(1, _SLAB // max(1, length)) if rows > 1 else 1
    wide = length if rows > 1 else _SLAB
    for top in range(0, rows, high):
        for left in range(0, length, max(1, wide)):
            yield slice(top, top + high), slice(left, left + wide)


def _difference(view: Tensor, origin: Tensor | None, part: tuple[slice, slice]) -> Tensor:
    return view[part].double() if origin is None else view[part].double() - origin[part].double()

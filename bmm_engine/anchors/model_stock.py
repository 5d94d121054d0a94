"""Model Stock: between the base and the mean expert, as far as the angle between the experts says (arXiv 2403.19522)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bmm_engine.anchors.contract import anchor
from bmm_engine.anchors.sphere import combine, unit_gram, vector_gram

# `1 + (T-1) c = |sum of the unit task vectors|^2 / T`: below this nothing is left of them but rounding errors.
_SINGULAR = 1e-12


@anchor(scope="tensor", experts=(2, None), paper="Jang et al. 2024, arXiv 2403.19522")
def model_stock(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    average: Literal["cosine", "angle"] = "cosine",
    filter_wise: bool = False,
) -> Tensor:
    """`W = t mean(W_t) + (1 - t) W_0` with `t = T c / (1 + (T-1) c)`, `c` the cosine between two experts' task vectors.

    `average`: of more than two experts, c is the mean cosine of the pairs, or the cosine of their mean "angle" (the paper assumes one angle for
    all pairs; its derivation is linear in the cosine). `filter_wise`: an angle for each row (output) instead of one for the tensor.
    A zero task vector counts as orthogonal to the others; where the directions cancel out, the base is kept.
    """
    vectors: Literal["rows", "tensor"] = "rows" if filter_wise else "tensor"
    count = len(experts)
    cosines = unit_gram(vector_gram(experts, base, vectors))
    first, second = torch.triu_indices(count, count, offset=1, device=base.device)
    pairs = cosines[:, first, second]  # (V, T (T-1) / 2)
    cosine = pairs.acos().mean(1).cos() if average == "angle" else pairs.mean(1)
    denominator = 1 + (count - 1) * cosine
    cancels = denominator < _SINGULAR
    t = torch.where(cancels, 0.0, count * cosine / torch.where(cancels, 1.0, denominator))
    return combine(experts, base, (t / count)[:, None].expand(-1, count), vectors)

"""What a blend does to its tensors, in numbers: what the public functions check and the backends read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

COMBINES = ("sum", "elect_sum", "elect_count", "largest", "mean_kept", "consensus")


@dataclass(frozen=True)
class Part:
    """One expert's part. Its difference d contributes `factor * d` where it is kept.

    `lower` and `upper` are float32 numbers. `keep` is None, or (low, width) with the probability low + width * rank in
    float32; `ranks` holds the ranks, or None for 0.
    """

    factor: float = 1.0
    weight: float = 1.0
    lower: float = -math.inf
    upper: float = math.inf
    keep: tuple[float, float] | None = None
    seed: int = 0
    ranks: Tensor | None = None
    unique: float = 1.0
    dominance: float = 0.0


@dataclass(frozen=True)
class Rule:
    """How the contributions become one; `parts` has one for each expert."""

    parts: tuple[Part, ...]
    combine: str = "sum"
    first: int = 0
    inverse: bool = False
    normalize: bool = False
    tie: float = 1.0
    votes: int = 2
    scaling: float = 1.0

"""Adam (arXiv 1412.6980) for rules that are defined by its iterates: torch.optim.Adam's formula, without autograd and without its imports."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def adam(start: Tensor, gradient: Callable[[Tensor], Tensor], *, steps: int, learning_rate: float) -> Tensor:
    """`steps` of Adam from `start`, in its dtype, with torch's defaults: betas 0.9 and 0.999, eps 1e-8, no weight decay."""
    x, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        g = gradient(x)
        mean.lerp_(g, 0.1)
        square.mul_(0.999).addcmul_(g, g, value=0.001)
        spread = square.sqrt().div_(math.sqrt(1 - 0.999**step)).add_(1e-8)
        x.addcdiv_(mean, spread, value=-learning_rate / (1 - 0.9**step))
    return x

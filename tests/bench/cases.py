"""Every bench's case, small: what the tests of the suite measure."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import assemble, blend, cholesky, cross_gram, gram, ranks, regmean, residual, select, spectral
from bench.harness import Case

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

SMALL: dict[str, Callable[[torch.device], Case]] = {
    "gram": lambda device: gram.case(device, "small", 64, 48, BF16),
    "gram, grouped": lambda device: gram.grouped_case(device, "small", 3, 40, 32, F32),
    "cross_gram": lambda device: cross_gram.case(device, "small", 64, 48, BF16),
    "assemble": lambda device: assemble.case(device, "small", 3, 40, F32, F64),
    "residual": lambda device: residual.case(device, "small", 3, 24, 40, BF16),
    "spectral": lambda device: spectral.case(device, "small", 2, [(24, 16), (16, 24)], F64),
    "select": lambda device: select.case(device, "small", 4096, F32),
    "blend": lambda device: blend.case(device, "small", "TIES", 3, 4096, F32),
    "ranks": lambda device: ranks.case(device, "small", 3, 4096, F32),
    "cholesky": lambda device: cholesky.case(device, "small", 2, 32, 16, F64),
    "regmean float64": lambda device: regmean.case(device, "small", 32, 24, 2, 96, 32, F32, "float64"),
    "regmean float32": lambda device: regmean.case(device, "small", 32, 24, 2, 96, 32, BF16, "float32"),
}

"""`magnitude_ranks` (DELLA's chances) beside torch's way to ranks: an argsort of an argsort."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Plan, exactly, native_backends
from bmm_engine.ops.ranks import IMPLEMENTATIONS, magnitude_ranks

# rows, n
SHAPES = {
    "MiniLM 384": (1536, 384),
    "ViT-B attention 768": (768, 768),
    "Llama-8B q_proj 4096": (512, 4096),
    "Llama-8B down_proj 14336": (128, 14336),
    "one row": (1, 1 << 18),
}
DTYPES = (torch.float32, torch.bfloat16)


def cases(device: torch.device) -> Iterator[Plan]:
    for name, (rows, n) in SHAPES.items():
        for dtype in DTYPES:
            shape = f"{name}: {rows} x {n}"
            yield shape, partial(case, device, shape, rows, n, dtype)


def case(device: torch.device, shape: str, rows: int, n: int, dtype: torch.dtype) -> Case:
    base = torch.randn(rows, n, device=device).to(dtype)
    x = (base.float() + 0.1 * torch.randn(rows, n, device=device)).to(dtype)

    def rival() -> Tensor:
        magnitudes = (x.float() - base.float()).abs_()
        return magnitudes.argsort(dim=-1, stable=True).argsort(dim=-1).double().div_(n - 1).float()

    return Case(
        op="ranks",
        device=device,
        dtype=dtype,
        shape=shape,
        backends=native_backends(device, IMPLEMENTATIONS),
        ours=lambda backend: magnitude_ranks(x, base, backend=backend),
        rivals={"torch.argsort twice": rival},
        gate=exactly(lambda result: result.double(), rival().double()),
        flops=0,
        bytes=2 * x.nbytes + 4 * x.numel(),
        limit="copy",
    )

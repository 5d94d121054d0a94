"""`accumulate_cross_gram` with both sums of a sequential merge, `C += X^T Y` and `G += Y^T Y`, beside two products of torch in place."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Plan, arithmetic, as_good_as_torch, native_backends
from bmm_engine.ops.cross_gram import IMPLEMENTATIONS, accumulate_cross_gram
from bmm_engine.ops.gram import ACCUMULATE_DTYPES

# name: (rows, in)
SHAPES = {
    "MiniLM attention 384": (8192, 384),
    "MiniLM mlp.out 1536": (8192, 1536),
    "ViT-B attention 768": (8192, 768),
    "ViT-B mlp.fc2 3072": (4096, 3072),
    "one short batch 768": (64, 768),
}
GPU_SHAPES = {
    "ViT-L mlp.fc2, Llama-8B q_proj 4096": (8192, 4096),
    "Llama-8B down_proj 14336": (4096, 14336),
}
_CHECKED_COLUMNS = 256


def cases(device: torch.device) -> Iterator[Plan]:
    for name, (rows, n) in (SHAPES | (GPU_SHAPES if device.type == "cuda" else {})).items():
        shape = f"{name}: {rows} x {n}"
        for dtype in (torch.float32, torch.bfloat16):
            yield shape, partial(case, device, shape, rows, n, dtype)


def case(device: torch.device, shape: str, rows: int, n: int, dtype: torch.dtype) -> Case:
    accumulate = ACCUMULATE_DTYPES[dtype]
    X = torch.randn(rows, n, device=device)
    Y = (X + 0.1 * torch.randn(rows, n, device=device)).to(dtype)  # inputs that drifted a little
    X = X.to(dtype)
    C, G, rival_C, rival_G = (torch.zeros(n, n, dtype=accumulate, device=device) for _ in range(4))
    columns = torch.randperm(n, device=device)[:_CHECKED_COLUMNS].sort().values

    def ours(backend: str) -> tuple[Tensor, Tensor]:
        return accumulate_cross_gram(C, X, Y, G=G, backend=backend), G

    def rival() -> tuple[Tensor, Tensor]:
        wide_X, wide_Y = X.to(accumulate), Y.to(accumulate)
        return rival_C.addmm_(wide_X.T, wide_Y), rival_G.addmm_(wide_Y.T, wide_Y)

    def reset() -> None:
        for total in (C, G, rival_C, rival_G):
            total.zero_()

    def in_dtype(work_dtype: torch.dtype) -> Tensor:
        some_X, some_Y = X[:, columns].to(work_dtype), Y[:, columns].to(work_dtype)
        return torch.stack([some_X.T @ some_Y, some_Y.T @ some_Y])

    return Case(
        op="cross_gram",
        device=device,
        dtype=dtype,
        shape=shape,
        backends=native_backends(device, IMPLEMENTATIONS),
        ours=ours,
        rivals={"two torch.addmm_": rival},
        gate=as_good_as_torch(
            lambda results: torch.stack([result[columns][:, columns] for result in results]),
            in_dtype(accumulate),
            in_dtype(torch.float64),
        ),
        flops=2 * rows * n * n + rows * n * (n + 1),
        bytes=X.nbytes + Y.nbytes + 2 * C.nbytes + 2 * G.nbytes,
        limit=arithmetic(dtype),
        reset=reset,
    )

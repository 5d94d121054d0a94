"""`cholesky_` and `solve_right` over a batch of modules of one width, beside torch.linalg's batched routines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Plan, arithmetic, backward_stable, native_backends
from bmm_engine.ops.cholesky import IMPLEMENTATIONS, cholesky_, solve_right

# name: (batch, in, right-hand sides)
SHAPES = {
    "MiniLM attention 384": (6, 384, 384),
    "ViT-B attention 768": (12, 768, 768),
}
GPU_SHAPES = {"ViT-B mlp.fc2 3072": (12, 3072, 3072)}
_CHECKED_ROWS = 64


def cases(device: torch.device) -> Iterator[Plan]:
    for name, (batch, n, rows) in (SHAPES | (GPU_SHAPES if device.type == "cuda" else {})).items():
        shape = f"{name}: {batch} x {n}, {rows} right-hand sides"
        for dtype in (torch.float64, torch.float32):
            yield shape, partial(case, device, shape, batch, n, rows, dtype)


def case(device: torch.device, shape: str, batch: int, n: int, rows: int, dtype: torch.dtype) -> Case:
    X = torch.randn(batch, 2 * n, n, device=device, dtype=dtype)
    A = X.mT @ X / (2 * n)
    del X
    A = (A + A.mT) / 2
    A.diagonal(dim1=-2, dim2=-1).add_(0.03)
    rhs = torch.randn(batch, rows, n, device=device, dtype=dtype)
    work = torch.empty_like(A)

    def ours(backend: str) -> Tensor:
        lower, _ = cholesky_(work.copy_(A), backend=backend)
        return solve_right(lower, rhs, backend=backend)

    def rival() -> Tensor:
        lower, _ = torch.linalg.cholesky_ex(A)
        half = torch.linalg.solve_triangular(lower.mT, rhs, upper=True, left=False)
        return torch.linalg.solve_triangular(lower, half, upper=False, left=False)

    last = batch - 1
    return Case(
        op="cholesky",
        device=device,
        dtype=dtype,
        shape=shape,
        backends=native_backends(device, IMPLEMENTATIONS),
        ours=ours,
        rivals={"torch.linalg": rival},
        gate=backward_stable(lambda result: result[last, :_CHECKED_ROWS], A[last], rhs[last, :_CHECKED_ROWS]),
        flops=batch * (n**3 / 3 + 2 * rows * n * n),
        bytes=2 * A.nbytes + 2 * rhs.nbytes,
        limit=arithmetic(dtype),
    )

"""`assemble` beside torch's best: one `add_` per Gram into a buffer at hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Plan, as_good_as_torch, native_backends
from bmm_engine.ops.assemble import IMPLEMENTATIONS, assemble

# name: (T, in)
SHAPES = {
    "MiniLM mlp.out 1536": (8, 1536),
    "ViT-B attention 768": (8, 768),
    "ViT-B mlp.fc2 3072": (8, 3072),
    "ViT-L mlp.fc2, Llama-8B q_proj 4096": (5, 4096),
}
GPU_SHAPES = {
    "ViT-B mlp.fc2 3072, 20 tasks": (20, 3072),
    "Llama-8B down_proj 14336": (5, 14336),
}
DTYPES = ((torch.float32, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float64))
_CHECKED_ROWS = 256


def cases(device: torch.device) -> Iterator[Plan]:
    for name, (count, n) in (SHAPES | (GPU_SHAPES if device.type == "cuda" else {})).items():
        for dtype, out_dtype in DTYPES:
            shape = f"{name}: {count} x {n} x {n} to {str(out_dtype).removeprefix('torch.')}"
            yield shape, partial(case, device, shape, count, n, dtype, out_dtype)


def case(
    device: torch.device, shape: str, count: int, n: int, dtype: torch.dtype, out_dtype: torch.dtype | None = None
) -> Case:
    grams = [torch.randn(n, n, device=device).to(dtype) for _ in range(count)]
    weights = torch.linspace(0.1, 1.0, count).tolist()
    out = torch.zeros(n, n, dtype=out_dtype or dtype, device=device)
    rival_out = torch.zeros_like(out)
    ridge = 0.25

    def rival() -> Tensor:
        torch.mul(grams[0], weights[0], out=rival_out)
        for gram, weight in zip(grams[1:], weights[1:], strict=True):
            rival_out.add_(gram, alpha=weight)
        rival_out.diagonal().add_(ridge)
        return rival_out

    def in_dtype(work_dtype: torch.dtype) -> Tensor:
        some = torch.zeros(min(n, _CHECKED_ROWS), n, dtype=work_dtype, device=device)
        for gram, weight in zip(grams, weights, strict=True):
            some.add_(gram[:_CHECKED_ROWS].to(work_dtype), alpha=weight)
        some.diagonal().add_(ridge)
        return some

    return Case(
        op="assemble",
        device=device,
        dtype=dtype,
        shape=shape,
        backends=native_backends(device, IMPLEMENTATIONS),
        ours=lambda backend: assemble(grams, weights, ridge, out=out, backend=backend),
        rivals={"torch.add_ loop": rival},
        gate=as_good_as_torch(lambda result: result[:_CHECKED_ROWS], in_dtype(out.dtype), in_dtype(torch.float64)),
        flops=2 * count * n * n,
        bytes=count * grams[0].nbytes + out.nbytes,
        limit="copy",
        reset=lambda: out.fill_(float("nan")),
    )

"""`residual` beside the loop that torch needs: a difference in the dtype of the result, and a product onto it, per expert."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Plan, arithmetic, as_good_as_torch, native_backends
from bmm_engine.ops.residual import IMPLEMENTATIONS, residual

# name: (T, out, in)
SHAPES = {
    "MiniLM qkv 384": (8, 1152, 384),
    "MiniLM mlp.out 1536": (8, 384, 1536),
    "ViT-B mlp.fc1 768": (8, 3072, 768),
    "ViT-B mlp.fc2 3072": (8, 768, 3072),
    "ViT-L mlp.fc1 1024": (4, 4096, 1024),
}
GPU_SHAPES = {
    "ViT-L mlp.fc2 4096": (8, 1024, 4096),
    "Llama-8B q_proj 4096": (5, 4096, 4096),
    "Llama-8B down_proj 14336": (5, 4096, 14336),
}
# weights, Grams, result
DTYPES = (
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float64),
)
_CHECKED_ROWS, _CHECKED_COLUMNS = 64, 256


def cases(device: torch.device) -> Iterator[Plan]:
    for name, (count, outputs, n) in (SHAPES | (GPU_SHAPES if device.type == "cuda" else {})).items():
        for dtype, gram_dtype, out_dtype in DTYPES:
            shape = f"{name}: {count} x {outputs} x {n} to {str(out_dtype).removeprefix('torch.')}"
            yield shape, partial(case, device, shape, count, outputs, n, dtype, gram_dtype, out_dtype)


def case(
    device: torch.device,
    shape: str,
    count: int,
    outputs: int,
    n: int,
    dtype: torch.dtype,
    gram_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype = torch.float32,
) -> Case:
    base = torch.randn(outputs, n, device=device)
    anchor = base.to(dtype)
    experts = [(base + 0.1 * torch.randn(outputs, n, device=device)).to(dtype) for _ in range(count)]
    # As exactly symmetric as real Grams, and random like nothing that an op may rely on; a true product costs more than the bench.
    grams = [(half + half.T).to(gram_dtype) for half in (torch.randn(n, n, device=device) for _ in range(count))]
    weights = torch.linspace(0.5, 1.5, count).tolist()
    out = torch.zeros(outputs, n, dtype=out_dtype, device=device)
    rival_out = torch.zeros_like(out)
    rows = torch.randperm(outputs, device=device)[:_CHECKED_ROWS].sort().values
    columns = torch.randperm(n, device=device)[:_CHECKED_COLUMNS].sort().values

    def rival() -> Tensor:
        rival_out.zero_()
        for expert, gram, weight in zip(experts, grams, weights, strict=True):
            difference = expert.to(out_dtype) - anchor.to(out_dtype)
            rival_out.addmm_(difference, gram.to(out_dtype), alpha=weight)
        return rival_out

    def in_dtype(work_dtype: torch.dtype) -> Tensor:
        some = torch.zeros(len(rows), len(columns), dtype=work_dtype, device=device)
        for expert, gram, weight in zip(experts, grams, weights, strict=True):
            difference = expert[rows].to(work_dtype) - anchor[rows].to(work_dtype)
            some.addmm_(difference, gram[:, columns].to(work_dtype), alpha=weight)
        return some

    return Case(
        op="residual",
        device=device,
        dtype=dtype,
        shape=shape,
        backends=native_backends(device, IMPLEMENTATIONS),
        ours=lambda backend: residual(anchor, experts, grams, weights, out=out, backend=backend),
        rivals={"torch.addmm_ loop": rival},
        gate=as_good_as_torch(lambda result: result[rows][:, columns], in_dtype(out_dtype), in_dtype(torch.float64)),
        flops=2 * count * outputs * n * n,
        bytes=anchor.nbytes + sum(tensor.nbytes for tensor in (*experts, *grams)) + out.nbytes,
        limit=arithmetic(out_dtype),
        reset=lambda: out.fill_(float("nan")),
    )

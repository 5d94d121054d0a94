"""`accumulate_gram` beside torch's product in place, and `accumulate_grams` beside a loop of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Plan, arithmetic, as_good_as_torch, native_backends
from bmm_engine.ops.gram import ACCUMULATE_DTYPES, IMPLEMENTATIONS, accumulate_gram, accumulate_grams

# name: (rows, in)
SHAPES = {
    "MiniLM attention 384": (8192, 384),
    "MiniLM mlp.out 1536": (8192, 1536),
    "ViT-B attention 768": (8192, 768),
    "ViT-B mlp.fc2 3072": (8192, 3072),
    "ViT-L attention 1024": (8192, 1024),
    "ViT-L mlp.fc2, Llama-8B q_proj 4096": (4096, 4096),
    "one short batch 768": (64, 768),
}
GPU_SHAPES = {
    "ViT-B mlp.fc2 3072, long": (65536, 3072),
    "Llama-8B down_proj 14336": (8192, 14336),
}
GROUPED = {"ViT-B attention, 12 layers in one call": (12, 512, 768)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHECKED_COLUMNS = 256


def cases(device: torch.device) -> Iterator[Plan]:
    cuda = device.type == "cuda"
    for name, (rows, n) in (SHAPES | (GPU_SHAPES if cuda else {})).items():
        shape = f"{name}: {rows} x {n}"
        for dtype in DTYPES:
            yield shape, partial(case, device, shape, rows, n, dtype)
        if cuda:  # held to the fp32 peak like its exactness, not to that of the tensor cores: its share may pass 100 %
            yield f"{shape}, tf32x3", partial(case, device, f"{shape}, tf32x3", rows, n, torch.float32, "tf32x3")
    for name, (count, rows, n) in GROUPED.items():
        shape = f"{name}: {count} x {rows} x {n}"
        for dtype in DTYPES[:2]:
            yield shape, partial(grouped_case, device, shape, count, rows, n, dtype)


def case(device: torch.device, shape: str, rows: int, n: int, dtype: torch.dtype, precision: str = "ieee") -> Case:
    accumulate = ACCUMULATE_DTYPES[dtype]
    X = torch.randn(rows, n, device=device).to(dtype)
    G = torch.zeros(n, n, dtype=accumulate, device=device)
    rival_G = torch.zeros_like(G)
    columns = torch.randperm(n, device=device)[:_CHECKED_COLUMNS].sort().values
    some = X[:, columns]

    def addmm() -> Tensor:
        wide = X.to(accumulate)
        return rival_G.addmm_(wide.T, wide)

    def reset() -> None:
        G.zero_()
        rival_G.zero_()

    rivals: dict[str, Callable[[], Any]] = {"torch.addmm_": addmm}
    if dtype == torch.bfloat16 and device.type == "cpu":
        rivals["torch.mm to bfloat16"] = lambda: X.T @ X
    if X.element_size() == 2 and device.type == "cuda" and has_out_dtype(device):
        rivals["torch.mm(out_dtype=float32)"] = lambda: rival_G.add_(torch.mm(X.T, X, out_dtype=accumulate))
    return Case(
        op="gram",
        device=device,
        dtype=dtype,
        shape=shape,
        backends=native_backends(device, IMPLEMENTATIONS),
        ours=lambda backend: accumulate_gram(G, X, backend=backend, precision=precision),
        rivals=rivals,
        gate=as_good_as_torch(
            lambda result: result[columns][:, columns],
            some.to(accumulate).T @ some.to(accumulate),
            some.double().T @ some.double(),
        ),
        flops=rows * n * (n + 1),
        bytes=X.nbytes + 2 * G.nbytes,
        limit=arithmetic(dtype),
        reset=reset,
    )


def grouped_case(device: torch.device, shape: str, count: int, rows: int, n: int, dtype: torch.dtype) -> Case:
    accumulate = ACCUMULATE_DTYPES[dtype]
    Xs = [torch.randn(rows, n, device=device).to(dtype) for _ in range(count)]
    Gs = [torch.zeros(n, n, dtype=accumulate, device=device) for _ in Xs]
    rival_Gs = [torch.zeros_like(G) for G in Gs]
    columns = torch.randperm(n, device=device)[:_CHECKED_COLUMNS].sort().values

    def loop() -> list[Tensor]:
        for G, X in zip(rival_Gs, Xs, strict=True):
            wide = X.to(accumulate)
            G.addmm_(wide.T, wide)
        return rival_Gs

    def reset() -> None:
        for G in (*Gs, *rival_Gs):
            G.zero_()

    def in_dtype(work_dtype: torch.dtype) -> Tensor:
        some = [X[:, columns].to(work_dtype) for X in Xs]
        return torch.stack([rows.T @ rows for rows in some])

    return Case(
        op="gram",
        device=device,
        dtype=dtype,
        shape=shape,
        backends=native_backends(device, IMPLEMENTATIONS),
        ours=lambda backend: accumulate_grams(Gs, Xs, backend=backend),
        rivals={"torch.addmm_ loop": loop},
        gate=as_good_as_torch(
            lambda results: torch.stack([result[columns][:, columns] for result in results]),
            in_dtype(accumulate),
            in_dtype(torch.float64),
        ),
        flops=count * rows * n * (n + 1),
        bytes=count * (Xs[0].nbytes + 2 * Gs[0].nbytes),
        limit=arithmetic(dtype),
        reset=reset,
    )


def has_out_dtype(device: torch.device) -> bool:
    """Whether this torch multiplies 16-bit matrices into float32 (2.8 and later, on CUDA)."""
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True

"""`accumulate_gram` beside `torch.addmm(G, X.float().T, X.float())`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bench.harness import Case, Row, measure
from bmm_engine.ops.gram import ACCUMULATE_DTYPES, accumulate_gram

# name: (rows, in)
SHAPES = {
    "MiniLM attention 384": (8192, 384),
    "MiniLM mlp.out 1536": (8192, 1536),
    "ViT-B attention 768": (8192, 768),
    "ViT-B mlp.fc2 3072": (8192, 3072),
    "Llama-8B q_proj 4096": (4096, 4096),
    "Llama-8B down_proj 14336": (1024, 14336),
    "one short batch 768": (64, 768),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHECKED_COLUMNS = 512


def cases(device: torch.device, shapes: Sequence[str] | None = None) -> Iterator[Case]:
    for name in shapes or SHAPES:
        rows, n = SHAPES[name]
        for dtype in DTYPES:
            yield case(device, device.type, f"{name}: {rows} x {n}", rows, n, dtype)


def case(device: torch.device, backend: str, shape: str, rows: int, n: int, dtype: torch.dtype) -> Case:
    accumulate = ACCUMULATE_DTYPES[dtype]
    X = torch.randn(rows, n, device=device).to(dtype)
    G = torch.zeros(n, n, dtype=accumulate, device=device)
    columns = torch.randperm(n, device=device)[:_CHECKED_COLUMNS].sort().values
    some = X[:, columns]

    def ours():
        return accumulate_gram(G.zero_(), X, backend=backend)

    def rival():
        wide = X.to(accumulate)
        return torch.addmm(G.zero_(), wide.T, wide)

    return Case(
        op="gram",
        backend=backend,
        device=device,
        dtype=dtype,
        shape=shape,
        rival_name="torch.addmm",
        ours=ours,
        rival=rival,
        check=lambda result: result[columns][:, columns],
        same_dtype=some.to(accumulate).T @ some.to(accumulate),
        truth=some.double().T @ some.double(),
        flops=rows * n * (n + 1),
        bytes=X.nbytes + 2 * G.nbytes,
        limit="compute",
    )


def run(device: torch.device) -> Iterator[Row]:
    for one in cases(device):
        yield measure(one)

"""`assemble` beside torch's best: one `add_` per Gram into a buffer at hand."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Case, Row, measure
from bmm_engine.ops.assemble import assemble

# (in, T)
SHAPES = [(768, 8), (3072, 8), (4096, 5)]
LARGE = [(14336, 5)]  # on a GPU
_CHECKED_ROWS = 512


def cases(device: torch.device) -> Iterator[Case]:
    for n, count in SHAPES + (LARGE if device.type == "cuda" else []):
        for dtype, out_dtype in [
            (torch.float32, torch.float32),
            (torch.float32, torch.float64),
            (torch.float64, torch.float64),
        ]:
            yield case(device, device.type, n, count, dtype, out_dtype)


def case(device: torch.device, backend: str, n: int, count: int, dtype: torch.dtype, out_dtype: torch.dtype) -> Case:
    grams = [torch.randn(n, n, device=device).to(dtype) for _ in range(count)]
    weights = torch.linspace(0.1, 1.0, count).tolist()
    out = torch.zeros(n, n, dtype=out_dtype, device=device)
    ridge = 0.25

    def rival():
        torch.mul(grams[0], weights[0], out=out)
        for gram, weight in zip(grams[1:], weights[1:], strict=True):
            out.add_(gram, alpha=weight)
        out.diagonal().add_(ridge)
        return out

    def in_dtype(work_dtype):
        some = sum(weight * gram[:_CHECKED_ROWS].to(work_dtype) for gram, weight in zip(grams, weights, strict=True))
        some.diagonal().add_(ridge)
        return some

    return Case(
        op="assemble",
        backend=backend,
        device=device,
        dtype=dtype,
        shape=f"{count} x {n} x {n} to {str(out_dtype).removeprefix('torch.')}",
        rival_name="torch.add_ loop",
        ours=lambda: assemble(grams, weights, ridge, out=out, backend=backend),
        rival=rival,
        check=lambda result: result[:_CHECKED_ROWS],
        same_dtype=in_dtype(out_dtype),
        truth=in_dtype(torch.float64),
        flops=2 * count * n * n,
        bytes=count * grams[0].nbytes + out.nbytes,
        limit="memory",
    )


def run(device: torch.device) -> Iterator[Row]:
    for one in cases(device):
        yield measure(one)

"""`kth_largest_magnitude` (the threshold of TIES: keep the largest 20 %) beside torch's two ways to it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench.harness import Case, Plan, exactly, native_backends
from bmm_engine.ops.select import IMPLEMENTATIONS, kth_largest_magnitude

SIZE = 1 << 24
KEPT = 0.2


def cases(device: torch.device) -> Iterator[Plan]:
    for dtype in (torch.float32, torch.bfloat16):
        shape = f"largest {KEPT:.0%} of {SIZE >> 20} Mi"
        yield shape, partial(case, device, shape, SIZE, dtype)


def case(device: torch.device, shape: str, size: int, dtype: torch.dtype) -> Case:
    x = torch.randn(size, device=device).to(dtype)
    k = int(KEPT * size)
    truth = x.abs().sort().values[size - k].double()
    # float32 is told apart by its upper and its lower 16 bits, bfloat16 by the upper ones alone
    passes = 2 if dtype == torch.float32 else 1
    return Case(
        op="select",
        device=device,
        dtype=dtype,
        shape=shape,
        backends=native_backends(device, IMPLEMENTATIONS),
        ours=lambda backend: kth_largest_magnitude(x, k, backend=backend),
        rivals={
            "torch.topk": lambda: torch.topk(x.abs(), k).values.min(),
            "torch.kthvalue": lambda: torch.kthvalue(x.abs(), size - k + 1).values,
        },
        gate=exactly(lambda result: torch.as_tensor(result, dtype=torch.float64, device=device), truth),
        flops=0,
        bytes=passes * x.nbytes,
        limit="copy",
    )

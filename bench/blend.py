"""`blend` beside torch doing the same step by step: task arithmetic, TIES with its thresholds at hand, and DARE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Plan, exactly, native_backends
from bmm_engine.ops.blend import IMPLEMENTATIONS, blend

# T, elements
SHAPES = ((3, 1 << 24), (8, 1 << 24))
DTYPES = (torch.float32, torch.bfloat16)
THRESHOLD, DROPPED = 0.1, 0.5


def cases(device: torch.device) -> Iterator[Plan]:
    for rule in RULES:
        for count, size in SHAPES:
            for dtype in DTYPES:
                shape = f"{rule}: {count} experts of {size >> 20} Mi"
                yield shape, partial(case, device, shape, rule, count, size, dtype)


def case(device: torch.device, shape: str, rule: str, count: int, size: int, dtype: torch.dtype) -> Case:
    base = torch.randn(size, device=device).to(dtype)
    experts = [(base.float() + 0.1 * torch.randn(size, device=device)).to(dtype) for _ in range(count)]
    out = torch.zeros_like(base)
    options, rival = RULES[rule](count)
    checked = slice(0, 1 << 16)
    some = base[checked], [expert[checked] for expert in experts]
    # Which elements chance and elections choose must not hang on rounding errors, and the kernels promise torch's bits.
    truth = blend(*some, **options, out_dtype=dtype, backend="torch").double()
    return Case(
        op="blend",
        device=device,
        dtype=dtype,
        shape=shape,
        backends=native_backends(device, IMPLEMENTATIONS),
        ours=lambda backend: blend(base, experts, **options, out=out, backend=backend),
        rivals={"torch step by step": lambda: rival(base, experts).to(dtype)},
        gate=exactly(lambda result: result[checked].double(), truth),
        flops=3 * count * size,  # at least: a difference, its share, a sum
        bytes=(count + 2) * base.nbytes,
        limit="copy",
        reset=lambda: out.fill_(float("nan")),
    )


Rule = tuple[dict[str, Any], Callable[[Tensor, list[Tensor]], Tensor]]


def task_arithmetic(count: int) -> Rule:
    weight = 1 / count

    def rival(base: Tensor, experts: list[Tensor]) -> Tensor:
        out = base.float().clone()
        for expert in experts:
            out += weight * (expert.float() - base.float())
        return out

    return {"weights": [weight] * count}, rival


def ties(count: int) -> Rule:
    def rival(base: Tensor, experts: list[Tensor]) -> Tensor:
        wide = base.float()
        trimmed = [expert.float() - wide for expert in experts]
        trimmed = [torch.where(d.abs() >= THRESHOLD, d, 0.0) for d in trimmed]
        sign = sum(trimmed[1:], trimmed[0]).sign()
        sign = torch.where(sign == 0, 1.0, sign)
        total, agreeing = torch.zeros_like(wide), torch.zeros_like(wide)
        for d in trimmed:
            agrees = d.sign() == sign
            total += torch.where(agrees, d, 0.0)
            agreeing += agrees
        return wide + total / agreeing.clamp_(min=1)

    return {"combine": "elect_sum", "normalize": True, "lower": [THRESHOLD] * count}, rival


def dare(count: int) -> Rule:
    weight = 1 / count / (1 - DROPPED)

    def rival(base: Tensor, experts: list[Tensor]) -> Tensor:
        out = base.float().clone()
        for expert in experts:
            d = expert.float() - base.float()
            out += weight * d * torch.rand_like(d).ge_(DROPPED)
        return out

    return {"weights": [weight] * count, "keep": [1 - DROPPED] * count, "seeds": list(range(count))}, rival


RULES = {"task arithmetic": task_arithmetic, "TIES": ties, "DARE": dare}

"""WUDI (arXiv 2503.08099) of one module: its minimum in closed form, beside 300 steps of Adam as its authors' code takes them, and as ours does.

All in float32, the closed form with a float64 solve inside. The gate holds the closed form to the least-squares solution in float64; the error of
the rivals is their distance from it, since they stop short of the minimum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Gate, Plan, arithmetic
from bmm_engine.anchors import get_anchor
from tests.numerics import relative_error

WIDTH, EXPERTS, STEPS = 768, 8, 300
_CHECKED_ROWS = 64
# Relative to the largest entry of M: the rounding of W to float32, where M is a tenth of W.
_ALLOWED = 1e-5


def cases(device: torch.device) -> Iterator[Plan]:
    for outputs, width in ((WIDTH, WIDTH), (4 * WIDTH, WIDTH)):
        shape = f"{outputs}x{width}: {EXPERTS} experts"
        yield shape, partial(case, device, shape, outputs, width, EXPERTS, STEPS)


def case(device: torch.device, shape: str, outputs: int, width: int, count: int, steps: int) -> Case:
    base = 0.1 * torch.randn(outputs, width, device=device)
    experts = [base + 0.01 * torch.randn(outputs, width, device=device) for _ in range(count)]
    wudi = get_anchor("wudi")

    def merged_task_vector(weights: Tensor) -> Tensor:
        return weights[:_CHECKED_ROWS].double() - base[:_CHECKED_ROWS].double()

    truth = _truth(base, experts)

    def assert_right(got: Tensor) -> None:
        error = relative_error(got, truth)
        assert error <= _ALLOWED, f"relative error {error:.3e} > {_ALLOWED:.3e}"

    return Case(
        op="wudi",
        device=device,
        dtype=torch.float32,
        shape=shape,
        backends=("torch",),
        ours=lambda _: wudi(base, experts, solver="closed_form"),
        rivals={
            f"Adam by autograd, {steps} steps": lambda: base + _authors(base, experts, steps),
            f"ours, solver=adam, {steps} steps": lambda: wudi(base, experts, solver="adam", steps=steps),
        },
        gate=Gate(merged_task_vector, assert_right, lambda got: relative_error(got, truth)),
        # sum_t tau_t^T tau_t, the residual's products, factor, two triangular solves
        flops=count * (outputs * width * (width + 1) + 2 * outputs * width * width)
        + width**3 / 3
        + 2 * outputs * width**2,
        bytes=sum(tensor.nbytes for tensor in (base, *experts)),
        limit=arithmetic(torch.float64),
    )


def _truth(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    taus = [expert.double() - base.double() for expert in experts]
    norms = [tau.norm() for tau in taus]
    gram = sum((tau.T @ tau / norm**2 for tau, norm in zip(taus, norms, strict=True)), start=0.0)
    projected = sum(
        ((tau[:_CHECKED_ROWS] @ tau.T) @ tau / norm**2 for tau, norm in zip(taus, norms, strict=True)), start=0.0
    )
    return torch.linalg.solve(gram, projected, left=False)


def _authors(base: Tensor, experts: Sequence[Tensor], steps: int) -> Tensor:
    taus = torch.stack([expert - base for expert in experts])
    scale = taus.flatten(1).square().sum(1)[:, None, None]
    merged = torch.nn.Parameter(taus.sum(0))
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    with torch.enable_grad():
        for _ in range(steps):
            loss = (((merged - taus) @ taus.mT).square() / scale).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return merged.detach()

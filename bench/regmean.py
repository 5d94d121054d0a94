"""RegMean (Jin et al. 2023) of one module from activations that arrive in batches, as hooks deliver them: this engine's way beside the peers'.

The peers keep a running mean of the Gram in the activations' dtype, shrink its off-diagonal entries, and invert: float32, `torch.inverse`.
The engine adds to a float32 sum in place and solves in residual form by a Cholesky factor: in float64 (what `solve_map` does), and, beside it,
in the peers' float32. `backend` names what accumulates the Grams; the rest is what "auto" takes. Errors are of W itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Plan, arithmetic, as_good_as_torch, native_backends
from bmm_engine.ops.assemble import assemble
from bmm_engine.ops.cholesky import cholesky_, solve_right
from bmm_engine.ops.gram import IMPLEMENTATIONS, accumulate_gram
from bmm_engine.ops.residual import residual
from bmm_engine.solving.solve import solve_map

WIDTH, OUTPUTS, EXPERTS, ROWS, BATCH = 2048, 2048, 4, 4096, 512
SHRINK = 0.9
_CHECKED_ROWS = 64


def cases(device: torch.device) -> Iterator[Plan]:
    for dtype in (torch.float32, torch.bfloat16):
        for solve in ("float64", "float32"):
            shape = f"width {WIDTH}: {EXPERTS} experts x {ROWS} rows in batches of {BATCH}, solve in {solve}"
            yield shape, partial(case, device, shape, WIDTH, OUTPUTS, EXPERTS, ROWS, BATCH, dtype, solve)


def case(
    device: torch.device,
    shape: str,
    n: int,
    outputs: int,
    count: int,
    rows: int,
    batch: int,
    dtype: torch.dtype,
    solve: str,
) -> Case:
    base = torch.randn(outputs, n, device=device)
    experts = [base + 0.1 * torch.randn(outputs, n, device=device) for _ in range(count)]
    # Features of unlike size and a mean that is not 0, so that the Grams are neither diagonal nor alike
    size = torch.logspace(0, -1, n, device=device)
    activations = [
        ((torch.randn(rows, n, device=device) + torch.randn(n, device=device).mul_(0.3)) * size).to(dtype)
        for _ in range(count)
    ]

    def ours(backend: str) -> Tensor:
        grams = []
        for X in activations:
            G = torch.zeros(n, n, device=device)
            for x in X.split(batch):
                accumulate_gram(G, x, backend=backend)
            grams.append(assemble([G], [1 / rows], 0.0, shrink=SHRINK, out=G))
        return _solve_float64(experts, grams) if solve == "float64" else _solve_float32(experts, grams)

    def truth() -> Tensor:
        grams = [_shrunk(X.double().T @ X.double() / rows) for X in activations]
        projected = sum((W[:_CHECKED_ROWS].double() @ G for W, G in zip(experts, grams, strict=True)), start=0.0)
        return torch.linalg.solve(sum(grams, start=0.0), projected, left=False)

    return Case(
        op="regmean",
        device=device,
        dtype=dtype,
        shape=shape,
        backends=native_backends(device, IMPLEMENTATIONS),
        ours=ours,
        rivals={"running mean and torch.inverse": lambda: _peers(experts, activations, batch)},
        gate=as_good_as_torch(
            lambda weight: weight[:_CHECKED_ROWS],
            _peers(experts, [X.float() for X in activations], batch)[:_CHECKED_ROWS],
            truth(),
        ),
        # Grams, W_t G_t, factor, two triangular solves
        flops=count * (rows * n * (n + 1) + 2 * outputs * n * n) + n**3 / 3 + 2 * outputs * n * n,
        bytes=sum(tensor.nbytes for tensor in (*experts, *activations, base)),
        limit=arithmetic(torch.float32),
    )


def _solve_float64(experts: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    return solve_map(_mean(experts), experts, grams, alpha=0.0).weight


def _solve_float32(experts: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    anchor, ones = _mean(experts), [1.0] * len(grams)
    lower, _ = cholesky_(assemble(grams, ones, 0.0)[None])
    return solve_right(lower[0], residual(anchor, experts, grams, ones)).add_(anchor)


def _mean(experts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(experts)).mean(0)


def _peers(experts: Sequence[Tensor], activations: Sequence[Tensor], batch: int) -> Tensor:
    grams = []
    for X in activations:
        gram, seen = torch.zeros(X.shape[1], X.shape[1], dtype=X.dtype, device=X.device), 0
        for x in X.split(batch):
            total = seen + len(x)
            gram = gram * (seen / total) + (x.T @ x) * (1 / total)
            seen = total
        grams.append(_shrunk(gram.float()))
    projected = sum((W @ G for W, G in zip(experts, grams, strict=True)), start=torch.zeros_like(experts[0]))
    return projected @ torch.inverse(torch.stack(grams).sum(0))


def _shrunk(gram: Tensor) -> Tensor:
    return SHRINK * gram + (1 - SHRINK) * torch.diag(gram.diagonal())

"""A search trial over all linear modules of a model, new ridges written into live weights: `apply_spectral` beside what else does it.

That is a Cholesky factor and two triangular solves per module, with A_0 and R at hand in float64, and the same spectral formula in torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Plan, arithmetic, as_good_as_torch, native_backends
from bmm_engine.ops.spectral import IMPLEMENTATIONS, apply_spectral

# name: (layers, the (out, in) of each linear module of a layer; q, k and v share their input and are stacked)
MODELS = {"MiniLM": (6, [(1152, 384), (384, 384), (1536, 384), (384, 1536)])}
GPU_MODELS = {"ViT-B": (12, [(2304, 768), (768, 768), (3072, 768), (768, 3072)])}
_CHECKED_ROWS = 8


def cases(device: torch.device) -> Iterator[Plan]:
    for name, (layers, modules) in (MODELS | (GPU_MODELS if device.type == "cuda" else {})).items():
        for dtype in (torch.float32, torch.float64):
            shape = f"one trial over {name}, {layers} layers, in {str(dtype).removeprefix('torch.')}"
            yield shape, partial(case, device, shape, layers, modules, dtype)


@dataclass(frozen=True)
class _Module:
    live: Tensor
    anchor: Tensor
    gram: Tensor  # A_0, float64
    residual: Tensor  # R, float64
    eigenvalues: Tensor
    eigenvectors: Tensor
    projected: Tensor
    ridge: float

    def formula(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """W* by the spectral formula in `dtype`, from the tensors that ours reads."""
        shrinkage = 1 / (self.eigenvalues.double() + self.ridge)
        scaled = self.projected[rows].to(dtype) * shrinkage.to(dtype)
        return torch.addmm(self.anchor[rows].to(dtype), scaled, self.eigenvectors.T.to(dtype))


def case(device: torch.device, shape: str, layers: int, modules: list[tuple[int, int]], dtype: torch.dtype) -> Case:
    widths = {n: _spectrum(n, device) for _, n in modules}
    all_modules = []
    for layer in range(layers):
        for outputs, n in modules:
            gram, eigenvalues, eigenvectors = widths[n]
            anchor = torch.randn(outputs, n, device=device)
            residual = 0.1 * torch.randn(outputs, n, device=device, dtype=torch.float64) @ gram
            module = _Module(
                live=torch.zeros_like(anchor),
                anchor=anchor,
                gram=gram.clone(),  # every module reads memory of its own, as in a model
                residual=residual,
                eigenvalues=eigenvalues.to(dtype),
                eigenvectors=eigenvectors.to(dtype, copy=True),
                projected=(residual @ eigenvectors).to(dtype),
                ridge=0.1 * (1 + layer) * float(gram.diagonal().mean()),
            )
            all_modules.append(module)

    def ours(backend: str) -> list[Tensor]:
        return [
            apply_spectral(m.live, m.anchor, m.projected, m.eigenvectors, m.eigenvalues, m.ridge, backend=backend)
            for m in all_modules
        ]

    def cholesky() -> list[Tensor]:
        for m in all_modules:
            a = m.gram.clone()
            a.diagonal().add_(m.ridge)
            lower, _ = torch.linalg.cholesky_ex(a)
            half = torch.linalg.solve_triangular(lower.mT, m.residual, upper=True, left=False)
            moved = torch.linalg.solve_triangular(lower, half, upper=False, left=False)
            m.live.copy_(moved.add_(m.anchor))
        return [m.live for m in all_modules]

    def spectral() -> list[Tensor]:
        for m in all_modules:
            shrinkage = 1 / (m.eigenvalues + m.ridge)
            anchor = m.anchor.to(dtype)
            m.live.copy_(torch.addmm(anchor, m.projected * shrinkage, m.eigenvectors.T))
        return [m.live for m in all_modules]

    def reset() -> None:
        for m in all_modules:
            m.live.fill_(float("nan"))

    def in_dtype(work_dtype: torch.dtype) -> Tensor:
        some = slice(0, _CHECKED_ROWS)
        return torch.cat([m.formula(some, work_dtype).flatten() for m in all_modules])

    return Case(
        op="spectral",
        device=device,
        dtype=torch.float32,
        shape=shape,
        backends=native_backends(device, IMPLEMENTATIONS),
        ours=ours,
        rivals={"Cholesky and two solves, float64": cholesky, "torch.addmm, same formula": spectral},
        gate=as_good_as_torch(
            lambda weights: torch.cat([weight[:_CHECKED_ROWS].flatten() for weight in weights]),
            in_dtype(dtype).float(),
            in_dtype(torch.float64),
        ),
        flops=sum(2 * m.live.numel() * m.live.shape[1] for m in all_modules),
        bytes=sum(m.live.nbytes + m.anchor.nbytes + m.projected.nbytes + m.eigenvectors.nbytes for m in all_modules),
        limit=arithmetic(dtype),
        reset=reset,
    )


def _spectrum(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A_0 (in, in), its eigenvalues and eigenvectors, float64. Spread over some decades, as measured Grams are."""
    rows = torch.randn(2 * n, n, device=device, dtype=torch.float64)
    rows *= torch.logspace(0, -1.5, n, device=device, dtype=torch.float64)
    gram = rows.T @ rows / len(rows)
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    return gram, eigenvalues, eigenvectors

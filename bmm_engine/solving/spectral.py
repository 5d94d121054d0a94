"""Many ridges, and other filters, for one decomposition: the spectral path of a module's solution.

With `A_0 = sum_t beta_t G_t = Q diag(e) Q^T` and `B = R Q`, once:

    W*(lam) = W_a + R (A_0 + lam I)^{-1} = W_a + B diag(1 / (e + lam)) Q^T

for each trial: one scaled product, no factorisation, straight into a live weight. So is any filter's `W_a + B diag(f(e) / e) Q^T` (`filters.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.ops.spectral import apply_spectral
from bmm_engine.solving.filters import Filter
from bmm_engine.solving.moments import BLOCK_ROWS, Moment
from bmm_engine.solving.solve import (
    as_moment,
    assemble_moments,
    relative_ridge,
    residual_of,
)
from bmm_engine.solving.task_weights import check_task_weights


@dataclass(frozen=True)
class SpectralPath:
    """What every ridge of one module shares.

    `anchor` W_a (out, in); `projected` B (out, in) and `eigenvectors` Q (in, in) in one dtype; `eigenvalues` e (in,) float64, ascending;
    `trace` of A_0. Change the task weights, the experts or the Grams, and the path must be made anew.
    """

    anchor: Tensor
    projected: Tensor
    eigenvectors: Tensor
    eigenvalues: Tensor
    trace: float
    task_weights: tuple[float, ...]

    def solve(
        self,
        *,
        alpha: float | None = None,
        ridge: float | None = None,
        filter: str = "ridge",
        directions: int | float | str | None = None,
        base: Tensor | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
        precision: str = "ieee",
        backend: str = "auto",
    ) -> Tensor:
        """`W_0 + s (W*(lam) - W_0)` (out, in) for one ridge, in `out` (any floating dtype and strides) or a new tensor like the anchor.

        Give `alpha` (relative ridge, `lam = alpha trace(A_0) / in`; inf is the anchor) or `ridge` (`lam` itself). `filter`, `directions`: how far
        each eigenvector is followed, as in `bmm_engine.Filter`. `base` W_0 is needed where `scale` is not 1. Raises `ConfigError`,
        `ShapeMismatchError`, `BackendError`.
        """
        if (alpha is None) == (ridge is None):
            raise ConfigError("give alpha (relative ridge) or ridge (absolute), and not both.")
        lam = relative_ridge(alpha, self.trace, self.anchor.shape[1]) if alpha is not None else float(ridge or 0.0)
        out = torch.empty_like(self.anchor) if out is None else out
        chosen = Filter(filter, directions)
        return apply_spectral(
            out,
            self.anchor,
            self.projected,
            self.eigenvectors,
            self.eigenvalues,
            lam if chosen.plain else None,
            factors=None if chosen.plain else chosen.factors(self.eigenvalues, lam),
            base=base,
            scale=scale,
            precision=precision,
            backend=backend,
        )


@dataclass(frozen=True)
class Spectrum:
    """`A_0 = Q diag(e) Q^T` of one input: `eigenvectors` Q (in, in) and `eigenvalues` e (in,), both float64, and the trace of A_0."""

    eigenvectors: Tensor
    eigenvalues: Tensor
    trace: float
    task_weights: tuple[float, ...]

    def path(
        self, anchor: Tensor, experts: Sequence[Tensor], moments: Sequence[Moment], dtype: torch.dtype = torch.float32
    ) -> SpectralPath:
        """The path of one module (out, in) that reads this input, kept in `dtype`; `moments` as decomposed."""
        projected = self.project(anchor, experts, moments, dtype)
        # Columns contiguous, as LAPACK leaves them: Q^T is read row by row.
        q = self.eigenvectors.to(dtype).mT.contiguous().mT
        return SpectralPath(anchor, projected, q, self.eigenvalues, self.trace, self.task_weights)

    def project(
        self, anchor: Tensor, experts: Sequence[Tensor], moments: Sequence[Moment], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """`B = R Q` (out, in) of one module, `R = sum_t beta_t (W_t - W_a) G_t`, computed in float64 and kept in `dtype`."""
        projected = torch.empty(anchor.shape, dtype=dtype, device=anchor.device)
        for start in range(0, anchor.shape[0], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            r = residual_of(anchor[rows], [e[rows] for e in experts], moments, self.task_weights)
            projected[rows] = r @ self.eigenvectors
        return projected


@accepts_dlpack
def spectral_path(
    anchor: Tensor,
    experts: Sequence[Tensor],
    grams: Sequence[Tensor | Moment],
    task_weights: Sequence[float] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    name: str = "module",
) -> SpectralPath:
    """Decompose one module, or several that share their input, stacked along `out`.

    `anchor` and `experts[t]` (out, in), any floating dtype; `grams[t]` G_t (in, in), or a moment; `task_weights` beta_t (all 1 by default).
    The decomposition and `B = R Q` are computed in float64 and kept in `dtype`: rounding them to float32 costs each coefficient its last
    digits and no more, however ill-conditioned A_0 is, since nothing is solved with them. Raises `ConfigError`, `NonFiniteGramError`,
    `ShapeMismatchError`.
    """
    betas = tuple(float(w) for w in task_weights) if task_weights is not None else (1.0,) * len(experts)
    if len(grams) != len(experts):
        raise ConfigError(f"{name}: {len(experts)} experts and {len(grams)} Grams; give one Gram for each expert.")
    moments = [as_moment(gram, None, anchor.shape[1], name) for gram in grams]
    spectrum = decompose(moments, betas, name=name, device=anchor.device)
    return spectrum.path(anchor, experts, moments, dtype)


def decompose(
    moments: Sequence[Moment],
    task_weights: Sequence[float],
    *,
    name: str = "module",
    device: torch.device | str = "cpu",
) -> Spectrum:
    """The eigendecomposition of `A_0 = sum_t beta_t G_t` of modules that share their input, in float64. Raises as `spectral_path`."""
    betas = tuple(map(float, task_weights))
    check_task_weights(betas, len(moments), name)
    a = torch.empty(moments[0].width, moments[0].width, dtype=torch.float64, device=device)
    assemble_moments(a, moments, betas)
    trace = float(a.diagonal().sum())
    eigenvalues, q = torch.linalg.eigh(a)
    return Spectrum(q, eigenvalues, trace, betas)

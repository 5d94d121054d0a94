"""Matrices of low rank, kept as two factors: what a LoRA adapter adds to a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, ShapeMismatchError

# Elements of the product that exist in float64 at a time.
BLOCK_ELEMENTS = 2**20


@dataclass(frozen=True)
class LowRank:
    """`left @ right`: `left` (out, r) and `right` (r, in), both float32 or both float64, on one device.

    Raises `ShapeMismatchError` for factors that do not fit together, `ConfigError` for another dtype.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.dim() != 2 or self.right.dim() != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ShapeMismatchError(
                f"low-rank factors: left {tuple(self.left.shape)} and right {tuple(self.right.shape)} do not multiply;"
                " give (out, r) and (r, in)."
            )
        if self.left.dtype != self.right.dtype or self.left.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"low-rank factors: dtypes {self.left.dtype} and {self.right.dtype}; give float32 or float64 for both."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Columns of `left`: an upper bound of the rank."""
        return self.left.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def mT(self) -> LowRank:
        """The transpose (in, out), on the same memory."""
        return LowRank(self.right.mT, self.left.mT)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LowRank:
        device, dtype = device or self.device, dtype or self.dtype
        return LowRank(self.left.to(device, dtype), self.right.to(device, dtype))

    def scale(self, factor: float) -> LowRank:
        return LowRank(self.left * factor, self.right)

    def add_to(self, out: Tensor) -> Tensor:
        """`out += left @ right` in place, `out` (out, in): summed in float64, a block of rows at a time, rounded once.

        So the bits of a float32 or 16-bit `out` do not depend on how its rows are grouped into calls.
        """
        right = self.right.double()
        step = max(1, BLOCK_ELEMENTS // max(1, out.shape[1]))
        for start in range(0, out.shape[0], step):
            rows = slice(start, start + step)
            out[rows] = torch.addmm(out[rows].double(), self.left[rows].double(), right)
        return out

    def dense(self, rows: slice | None = None) -> Tensor:
        """The matrix (out, in), or a range of its rows, in the dtype of the factors."""
        left = self.left if rows is None else self.left[rows]
        return LowRank(left, self.right).add_to(left.new_zeros(left.shape[0], self.shape[1]))

    def gram_factor(self) -> Tensor:
        """F (min(out, r), in), float64, with `F^T F = (left right)^T (left right)`.

        `left = Q R` gives `F = R right`: orthogonal, so as exact for a `left` without full rank as for any other.
        """
        return _triangle(self.left) @ self.right.double()

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD `left @ right = U diag(S) Vh` in float64: U (out, k), S (k,) descending, Vh (k, in); k = min(out, r, in).

        By QR of both factors and an SVD of order r: the cost is `(out + in) r^2`. Raises torch's LinAlgError where the
        factors are not finite.
        """
        q_left, r_left = torch.linalg.qr(self.left.double())
        q_right, r_right = torch.linalg.qr(self.right.mT.double())
        u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
        return q_left @ u, s, vh @ q_right.mT

    def norm(self) -> float:
        """Frobenius norm."""
        return float((_triangle(self.left) @ _triangle(self.right.mT).mT).norm())


def _triangle(factor: Tensor) -> Tensor:
    """R of the QR decomposition in float64."""
    return torch.linalg.qr(factor.double(), mode="r").R

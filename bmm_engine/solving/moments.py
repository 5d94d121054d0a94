"""Where an expert's second moment `G_t` comes from: data, its task vector, or both. One small interface for the solve.

A moment never has to exist as a matrix: the solve asks it to add itself to `A`, and to multiply rows from the right. So a stored Gram can
stay on disk until needed, and a task vector's `U^T U` is applied through its factor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, NonFiniteGramError, ShapeMismatchError
from bmm_engine.ops.assemble import assemble
from bmm_engine.ops.gram import accumulate_gram
from bmm_engine.ops.lowrank import LowRank

# Columns of a Gram, or rows of a task vector, that are widened to the solve's dtype at a time.
BLOCK = 1024
# Rows of W worked on at a time: the float64 working set is then a few of these blocks, whatever the module's height.
BLOCK_ROWS = 512


class Moment(Protocol):
    """`G_t`, symmetric positive semi-definite (in, in)."""

    @property
    def width(self) -> int: ...
    def trace(self) -> float: ...
    def add_to(self, a: Tensor, weight: float) -> None:
        """`a += weight * G` for `a` (in, in), in place, in the dtype of `a`."""
        ...

    def apply(self, rows: Tensor) -> Tensor:
        """`rows @ G` for `rows` (n, in), in their dtype."""
        ...


class DenseMoment:
    """`G_t = total / rows`: a measured Gram (in, in), in memory or behind a function that reads it each time it is used."""

    def __init__(
        self, total: Tensor | Callable[[], Tensor], rows: float = 1.0, *, width: int | None = None, module: str = ""
    ):
        self._lazy = callable(total)
        self._load: Callable[[], Tensor] = total if callable(total) else (lambda: total)
        self.rows = rows
        self.module = module
        self._width = width
        self._checked = False

    @property
    def width(self) -> int:
        if self._width is None:
            self._width = self._load().shape[0]
        return self._width

    def total(self) -> Tensor:
        """The sum over the rows (in, in), read now if it is not in memory. Raises `NonFiniteGramError`, `ShapeMismatchError`."""
        total = self._load()
        if not self._checked:
            if total.dim() != 2 or total.shape[0] != total.shape[1]:
                raise ShapeMismatchError(
                    f"{self.module}: a Gram must be square (in, in), this one is {tuple(total.shape)}."
                )
            if not torch.isfinite(total.sum()):
                count = int((~torch.isfinite(total)).sum())
                raise NonFiniteGramError(
                    f"{self.module}: its Gram holds {count} entries that are NaN or infinite. Collect it again.",
                    module=self.module,
                    count=count,
                )
            self._checked = True
        return total

    @property
    def resident(self) -> Tensor | None:
        """`total` where it is in memory, None where it is read for each use."""
        return None if self._lazy else self.total()

    def trace(self) -> float:
        return float(self.total().diagonal().sum(dtype=torch.float64)) / self.rows

    def add_to(self, a: Tensor, weight: float) -> None:
        assemble([a, self.total().to(a.device)], [1.0, weight / self.rows], 0.0, out=a)

    def apply(self, rows: Tensor) -> Tensor:
        total = self.total()
        if total.dtype == rows.dtype:
            return (rows @ total).div_(self.rows)
        out = torch.empty_like(rows)
        for start in range(0, total.shape[1], BLOCK):
            stop = start + BLOCK
            torch.matmul(rows, total[:, start:stop].to(rows), out=out[:, start:stop])
        return out.div_(self.rows)


def energy_factor(task_vector: Tensor | LowRank) -> Tensor:
    """F (rows, in) with `F^T F = U^T U`: of an adapter's task vector, r rows instead of out. A matrix is its own factor.

    All that depends on U through `U^T U` alone (`TaskVectorMoment`, `alignment`, the energy `tr(U G U^T)`) may be given F in the place of U.
    """
    if isinstance(task_vector, Tensor):
        return task_vector
    return task_vector.gram_factor() if task_vector.rank < min(task_vector.shape) else task_vector.dense()


class TaskVectorMoment:
    """`G_t = U^T U / c`, the data-free estimate (arXiv 2605.12843, Theorem 1), `U = W_t - W_0` (out, in).

    `normalization`: "trace" (`c = ||U||_F^2`, so that the trace is 1) or "none" (`c = 1`). A zero task vector gives `G = 0`.
    Kept as the matrix (in, in) where `in <= out`, else as the factor U: whichever is smaller is also the faster to apply. A `LowRank` U is kept
    as a factor (r, in).
    """

    def __init__(self, task_vector: Tensor | LowRank, normalization: str = "trace"):
        if normalization not in ("trace", "none"):
            raise ConfigError(f"task-vector Grams: normalization must be 'trace' or 'none', not {normalization!r}.")
        factor = energy_factor(task_vector)
        energy = float(factor.pow(2).sum(dtype=torch.float64))
        self.scale = 1.0 if normalization == "none" else (1.0 / energy if energy > 0 else 0.0)
        self._trace = energy * self.scale
        height, self._width = factor.shape
        self._factor = factor if height < self._width else None
        self._dense: DenseMoment | None = None
        if self._factor is None:
            gram = torch.zeros(self._width, self._width, dtype=torch.float64, device=factor.device)
            self._dense = DenseMoment(accumulate_gram(gram, factor.double()).mul_(self.scale))

    @property
    def width(self) -> int:
        return self._width

    def trace(self) -> float:
        return self._trace

    def add_to(self, a: Tensor, weight: float) -> None:
        if weight * self.scale == 0:
            return
        if self._factor is None:
            assert self._dense is not None
            return self._dense.add_to(a, weight)
        rows = self._factor.to(a)
        accumulate_gram(a, rows, row_weights=rows.new_full((rows.shape[0],), weight * self.scale))

    def apply(self, rows: Tensor) -> Tensor:
        if self._factor is None:
            assert self._dense is not None
            return self._dense.apply(rows)
        out = torch.zeros_like(rows)
        for part in self._factor.split(BLOCK):
            factor = part.to(rows)
            out.addmm_(rows @ factor.mT, factor, alpha=self.scale)
        return out


class SumMoment:
    """`sum_i w_i G_i`: the hybrid of data and task vector."""

    def __init__(self, parts: list[tuple[float, Moment]]):
        self.parts = parts

    @property
    def width(self) -> int:
        return self.parts[0][1].width

    def trace(self) -> float:
        return sum(weight * moment.trace() for weight, moment in self.parts)

    def add_to(self, a: Tensor, weight: float) -> None:
        for own, moment in self.parts:
            moment.add_to(a, weight * own)

    def apply(self, rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for own, moment in self.parts:
            out.add_(moment.apply(rows), alpha=own)
        return out


def hybrid_moment(data: Moment, task_vector: Tensor | LowRank, share: float) -> Moment:
    """`(1 - g) G_t / tr G_t + g U^T U / ||U||_F^2`, g = `share` in [0, 1]. A part without any mass is left at zero."""
    if not 0 <= share <= 1:
        raise ConfigError(f"hybrid share must be in [0, 1], not {share}.")
    trace = data.trace()
    own = (1 - share) / trace if trace > 0 else 0.0
    return SumMoment([(own, data), (share, TaskVectorMoment(task_vector))])


def alignment(moment: Moment, task_vector: Tensor | LowRank) -> float:
    """`cos_F(G_t, U^T U) = tr(G U^T U) / (||G||_F ||U^T U||_F)` in [0, 1]; NaN where either is zero. (in, in) and (out, in)."""
    u = energy_factor(task_vector).double()
    gram = torch.zeros(moment.width, moment.width, dtype=torch.float64, device=u.device)
    moment.add_to(gram, 1.0)
    product = float((moment.apply(u) * u).sum())
    norms = float(gram.norm()) * float((u @ u.mT if u.shape[0] < u.shape[1] else u.mT @ u).norm())
    return product / norms if norms > 0 else float("nan")

"""How far the inputs of a module have drifted, as second moments.

In a merged network the inputs of a module come from merged modules below it, and drift away from those that the experts were measured on. With
X_t (n, in) the rows that expert t reads, X~_t those that the merged network reads for the same tokens, and D_t = X~_t - X_t the drift, one solve
(`solve.py`) needs, over the rows of task t,

    G~_t = X~_t^T X~_t  (in, in)     and, for each module,     Q_t = W_t D_t^T X~_t  (out, in),     ||D_t W_t^T||^2,     ||X_t U_t^T||^2,

the last two for the record and for the task weights. There are two ways to come by them (`accumulators.py`):

* `DriftAccumulator` keeps G~, C = D^T X~ and D^T D, all (in, in), whatever the modules are: Q = W C, ||D W^T||^2 = tr(W D^T D W^T), and so on.
* `ProjectedAccumulator` knows the modules from the start and keeps Q itself: cheaper, in time and memory, where they have few outputs. It may also
  count in how far the residual stream has drifted that these modules write to: with S_t (n, out) what their outputs are added to in expert t, S~_t in
  the merged network, it puts D_t W_t^T + (S~_t - S_t), how far the sum would drift under the expert's weight, in the place of D_t W_t^T throughout.

The cross-moment is taken of the drift, not of X_t: what does not drift adds exactly nothing, so that without drift this is plain BMM, and small
drifts keep their digits in float32.

Of the drift a share a may be corrected (`toward`; FeatCal, arXiv 2605.13030): the target is then `((1 - a) X~_t + a X_t) W_t^T`, so that a D_t takes
the place of D_t (and a times that of the stream the place of its drift) in Q_t, in ||D_t W_t^T||^2 and in misfits; what fine-tuning changed stays.

Few rows leave most directions of G~_t to the anchor. `with_task_vector` lets the task vector fill them, as the hybrid of plain BMM does: rows along
it that do not drift.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError
from bmm_engine.ops.gram import accumulate_gram
from bmm_engine.solving.frobenius import matrix_norm
from bmm_engine.solving.moments import BLOCK_ROWS, DenseMoment, Moment, SumMoment, TaskVectorMoment
from bmm_engine.solving.output_metric import OutputMetric

M = TypeVar("M", bound="TaskMoments")


class TaskMoments(ABC):
    """One task's moments at one input: sums over `rows` rows; with a bias they are those of [x, 1], and `width` counts it. Of weighed rows
    `rows` is the sum of their weights."""

    gram: Tensor
    total: Tensor  # (in,), the sum of the rows that the merged network reads
    rows: float
    name: str
    with_bias: bool
    hybrid: Tensor | None  # (in, in), what a solve takes in the place of `gram`: see `with_task_vector`
    drift_share: float  # of the drift, how much is corrected: see `toward`

    @property
    def width(self) -> int:
        return self.gram.shape[0]

    @property
    def norm(self) -> float:
        """`||X~^T X~||_F / n`."""
        return matrix_norm(self.gram) / self.rows

    def merged(self, mean_weight: float = 0.0) -> Moment:
        """`X~^T X~ / n`, of what the merged network reads (or its hybrid), and `mean_weight` times the outer product of its mean."""
        gram = DenseMoment(self.counted, self.rows, module=self.name)
        if not mean_weight:
            return gram
        mean = (self.total / self.rows)[None]
        return SumMoment([(1.0, gram), (mean_weight, TaskVectorMoment(mean, normalization="none"))])

    @property
    def counted(self) -> Tensor:
        """What a solve takes for the Gram (in, in)."""
        return self.gram if self.hybrid is None else self.hybrid

    def toward(self: M, drift_share: float) -> M:
        """With the target `((1 - a) X~ + a X) W_t^T`, a = `drift_share` in [0, 1], of the share of the drift that is corrected."""
        return replace(self, drift_share=drift_share)  # type: ignore[type-var]

    def with_task_vector(self: M, task_vector: Tensor, share: float) -> M:
        """With the hybrid `(1 - g) G~ / tr G~ + g U^T U / ||U||_F^2`, g = `share` in [0, 1), scaled so that G~ counts as before.

        `task_vector` U (out, in), of all modules that read the input; a bias in it does not count. A zero one leaves G~ as it is.
        """
        rows = task_vector.to(self.gram, copy=True)
        if self.with_bias:
            rows[:, -1] = 0
        energy = float(rows.square().sum(dtype=torch.float64))
        if share == 0 or energy == 0:
            return self
        mass = share / (1 - share) * float(self.gram.diagonal().sum(dtype=torch.float64)) / energy
        weights = rows.new_full(rows.shape[:1], mass)
        return replace(self, hybrid=accumulate_gram(self.gram.clone(), rows, row_weights=weights))  # type: ignore[type-var]

    @abstractmethod
    def drifted_total(self, expert: Tensor) -> Tensor:
        """The sum of the rows of `a D W_t^T` (out,), float64."""

    @abstractmethod
    def of(self, outputs: slice) -> TaskMoments:
        """Those of a part of the modules' stacked outputs."""

    @abstractmethod
    def drifted(self, expert: Tensor) -> Tensor:
        """`Q = a W_t D^T X~` (out, in), float64, for the expert's weight W_t (out, in)."""

    @abstractmethod
    def target_drift(self, expert: Tensor) -> float:
        """`||a D W_t^T||_F^2`."""

    def misfit(self, weight: Tensor, expert: Tensor) -> float:
        """`||X~ W^T - X W_t^T||_F^2 = tr(E G~ E^T) + 2 tr(E Q^T) + ||a D W_t^T||^2` with E = W - W_t (and X~ - a D for X), by blocks of rows."""
        total = 0.0
        for start in range(0, weight.shape[0], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            own, part, gap = self.of(rows), expert[rows], weight[rows] - expert[rows]
            total += own.target_drift(part) + squared(gap, self.gram) + 2 * float((own.drifted(part) * gap).sum())
        return max(0.0, total)

    @abstractmethod
    def energy(self, task_vectors: Iterable[Tensor]) -> float:
        """`||X U_t^T||_F^2`, summed over modules; task vectors (out, in)."""

    @abstractmethod
    def weighted_energy(self, task_vector: Tensor, metric: OutputMetric) -> float:
        """`tr(X U_t^T S U_t X^T)` for the metric S, of one module."""


@dataclass(frozen=True)
class DriftMoments(TaskMoments):
    """`gram` X~^T X~, `cross` D^T X~, `drift` D^T D, each (in, in); `total` and `drift_total` (in,), sums of the rows of X~ and D."""

    gram: Tensor
    cross: Tensor
    drift: Tensor
    total: Tensor
    drift_total: Tensor
    rows: float
    name: str = "module"
    with_bias: bool = False
    hybrid: Tensor | None = None
    drift_share: float = 1.0

    def of(self, outputs: slice) -> DriftMoments:
        return self

    def drifted(self, expert: Tensor) -> Tensor:
        return (expert.double() @ self.cross.double()).mul_(self.drift_share)

    def drifted_total(self, expert: Tensor) -> Tensor:
        return (expert.double() @ self.drift_total).mul_(self.drift_share)

    def target_drift(self, expert: Tensor) -> float:
        return self.drift_share**2 * squared(expert, self.drift)

    def energy(self, task_vectors: Iterable[Tensor]) -> float:
        own = self._own()
        return max(0.0, sum(squared(u, own) for u in task_vectors))

    def weighted_energy(self, task_vector: Tensor, metric: OutputMetric) -> float:
        rows, own = task_vector.to(self.gram), self._own()
        seen = metric.directions.to(own).mT @ rows
        return max(0.0, metric.level * squared(rows, own) + squared(seen, own))

    def _own(self) -> Tensor:
        """X^T X, since X = X~ - D."""
        return self.gram - self.cross - self.cross.mT + self.drift


@dataclass(frozen=True)
class ProjectedMoments(TaskMoments):
    """`gram` X~^T X~ (in, in); `product` Q (out, in); `total` (in,) and `product_total` (out,), sums of the rows of X~ and of D W_t^T; `drift`
    (out,), the squared norms of the columns of D W_t^T (with what the residual stream has drifted, where that was given); `change`, U_t X^T X U_t^T
    (out, out), or its diagonal (out,)."""

    gram: Tensor
    product: Tensor
    total: Tensor
    product_total: Tensor
    drift: Tensor
    change: Tensor
    rows: float
    name: str = "module"
    with_bias: bool = False
    hybrid: Tensor | None = None
    drift_share: float = 1.0

    def of(self, outputs: slice) -> ProjectedMoments:
        return replace(
            self,
            product=self.product[outputs],
            product_total=self.product_total[outputs],
            drift=self.drift[outputs],
            change=self.change[outputs, outputs] if self.change.dim() == 2 else self.change[outputs],
        )

    def drifted(self, expert: Tensor) -> Tensor:
        return self.drift_share * self.product.double()

    def drifted_total(self, expert: Tensor) -> Tensor:
        return self.drift_share * self.product_total

    def target_drift(self, expert: Tensor) -> float:
        return self.drift_share**2 * float(self.drift.sum())

    def energy(self, task_vectors: Iterable[Tensor]) -> float:
        norms = self.change.diagonal() if self.change.dim() == 2 else self.change
        return float(norms.sum(dtype=torch.float64))

    def weighted_energy(self, task_vector: Tensor, metric: OutputMetric) -> float:
        if self.change.dim() != 2:
            raise ConfigError(f"{self.name}: was measured without `whole_change`, which an output metric needs.")
        seen = squared(metric.directions.mT, self.change)
        return max(0.0, metric.level * self.energy(()) + seen)


def squared(rows: Tensor, second: Tensor) -> float:
    """`tr(rows S rows^T)`, multiplied in the dtype of S."""
    rows = rows.to(second.dtype)
    return float(((rows @ second) * rows).sum(dtype=torch.float64))

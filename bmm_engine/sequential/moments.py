"""How far the inputs of a module have drifted, as second moments.

In a merged network the inputs of a module come from merged modules below it, and drift away from those that the experts were measured on. With
X_t (n, in) the rows that expert t reads, X~_t those that the merged network reads for the same tokens, and D_t = X~_t - X_t the drift, one solve
(`solve.py`) needs, over the rows of task t,

    G~_t = X~_t^T X~_t  (in, in)     and, for each module,     Q_t = W_t D_t^T X~_t  (out, in),     ||D_t W_t^T||^2,     ||X_t U_t^T||^2,

the last two for the record and for the task weights. There are two ways to come by them:

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
from torch.nn.functional import pad

from bmm_engine.errors import ConfigError, EmptyCalibrationError, NonFiniteGramError, ShapeMismatchError
from bmm_engine.ops.cross_gram import accumulate_cross_gram
from bmm_engine.ops.gram import accumulate_gram
from bmm_engine.solving.moments import DenseMoment, Moment, SumMoment, TaskVectorMoment
from bmm_engine.solving.output_metric import OutputMetric
from bmm_engine.solving.solve import BLOCK_ROWS, matrix_norm

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


class Accumulator(ABC):
    """Adds up pairs of rows: what an expert and the merged network read for the same tokens.

    Rows in float32 or 16 bits accumulate in float32, float64 ones in float64.
    """

    def __init__(self, width: int, name: str, dtype: torch.dtype, device: torch.device | str):
        self.width, self.name, self.dtype = width, name, dtype
        self.rows: float = 0
        self._gram = torch.zeros(width, width, dtype=dtype, device=device)
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)

    def update(
        self,
        expert: Tensor,
        merged: Tensor,
        stream_drift: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        """Add rows (..., in) of the expert and of the merged network; leading dimensions are flattened.

        `stream_drift` (..., out): how far what the modules' outputs are added to has drifted, merged less expert (by default not at all; only
        for a `ProjectedAccumulator`). `weights`: of the rows, flattened, finite and >= 0; None for ones.
        Raises `ShapeMismatchError` (another width, unequal rows), `NonFiniteGramError` (whose rows, how many); then nothing was added.
        """
        if merged.shape != expert.shape or merged.shape[-1] != self.width:
            raise ShapeMismatchError(
                f"{self.name}: the expert reads {tuple(expert.shape)}, the merged network {tuple(merged.shape)}; both must have the same rows of"
                f" width {self.width}."
            )
        expert, merged = (rows.detach().reshape(-1, self.width) for rows in (expert, merged))
        if merged.shape[0] == 0:
            return
        drift = merged - expert
        stream = None if stream_drift is None else self._stream_rows(stream_drift, len(drift))
        if weights is not None:
            weights = weights.to(merged.device, self.dtype)
        sums = [self._column_sums(rows, weights) for rows in (merged, drift, stream) if rows is not None]
        if not all(bool(torch.isfinite(s).all()) for s in sums):
            self._report(expert, merged, stream)
        self._add(expert, merged, drift, sums[1], stream, weights, backend)
        self._sum += sums[0]
        self.rows += merged.shape[0] if weights is None else float(weights.sum(dtype=torch.float64))

    @abstractmethod
    def moments(self, *, with_bias: bool = False) -> TaskMoments:
        """The sums so far; `with_bias`: of [x, 1] (in + 1, in + 1), so that the bias is solved with the weight.

        Raises `EmptyCalibrationError` without rows.
        """

    @abstractmethod
    def _add(
        self,
        expert: Tensor,
        merged: Tensor,
        drift: Tensor,
        drift_sum: Tensor,
        stream: Tensor | None,
        weights: Tensor | None,
        backend: str,
    ) -> None: ...

    def _stream_rows(self, stream_drift: Tensor, rows: int) -> Tensor:
        raise ConfigError(f"{self.name}: only a ProjectedAccumulator counts in the drift of the residual stream.")

    def _column_sums(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        ones = torch.ones(1, rows.shape[0], dtype=self.dtype, device=rows.device) if weights is None else weights[None]
        return (ones @ rows.to(self.dtype))[0]

    def _whole_gram(self, with_bias: bool) -> Tensor:
        """Raises `EmptyCalibrationError` without rows."""
        if self.rows == 0:
            raise EmptyCalibrationError(
                f"{self.name}: no rows were measured; give calibration data that is not all padding."
            )
        if not with_bias:
            return self._gram
        gram = pad(self._gram, (0, 1, 0, 1))
        gram[-1, :-1] = gram[:-1, -1] = self._sum.to(self.dtype)
        gram[-1, -1] = self.rows
        return gram

    def _total(self, with_bias: bool) -> Tensor:
        return pad(self._sum, (0, 1), value=float(self.rows)) if with_bias else self._sum

    def _report(self, expert: Tensor, merged: Tensor, stream: Tensor | None) -> None:
        for whose, rows in (("the expert", expert), ("the merged network", merged), ("the residual stream", stream)):
            if rows is None:
                continue
            count = int((~torch.isfinite(rows).all(-1)).sum())
            if count:
                raise NonFiniteGramError(
                    f"{self.name}: {count} of {rows.shape[0]} rows of {whose} there hold NaN or infinity; nothing was added. Check the"
                    " calibration batch, or run the models in float32.",
                    module=self.name,
                    count=count,
                )
        raise NonFiniteGramError(
            f"{self.name}: the sum of its input rows overflows; nothing was added. Run the models in float32.",
            module=self.name,
            count=0,
        )


class DriftAccumulator(Accumulator):
    """For any modules that read rows of `width` features."""

    def __init__(
        self,
        width: int,
        *,
        name: str = "module",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__(width, name, dtype, device)
        self._cross, self._drift = (torch.zeros(width, width, dtype=dtype, device=device) for _ in range(2))
        self._drift_sum = torch.zeros(width, dtype=torch.float64, device=device)

    def _add(
        self,
        expert: Tensor,
        merged: Tensor,
        drift: Tensor,
        drift_sum: Tensor,
        stream: Tensor | None,
        weights: Tensor | None,
        backend: str,
    ) -> None:
        accumulate_cross_gram(self._cross, drift, merged, weights, G=self._gram, backend=backend)
        accumulate_gram(self._drift, drift, weights, backend=backend)
        self._drift_sum += drift_sum

    def moments(self, *, with_bias: bool = False) -> DriftMoments:
        gram, total = self._whole_gram(with_bias), self._total(with_bias)
        if not with_bias:
            return DriftMoments(gram, self._cross, self._drift, total, self._drift_sum, self.rows, self.name)
        cross, drift = pad(self._cross, (0, 1, 0, 1)), pad(self._drift, (0, 1, 0, 1))
        cross[:-1, -1] = self._drift_sum.to(self.dtype)  # the constant 1 does not drift: its own row stays zero
        return DriftMoments(gram, cross, drift, total, pad(self._drift_sum, (0, 1)), self.rows, self.name, True)


class ProjectedAccumulator(Accumulator):
    """For one stack of modules: `expert` W_t and `task_vector` U_t (out, in), or [W | b] (out, in + 1).

    Its updates may count in how far the residual stream has drifted that the modules' outputs are added to. `whole_change`: keep U_t X^T X U_t^T
    whole, which energies in an output metric need.
    """

    def __init__(
        self,
        expert: Tensor,
        task_vector: Tensor,
        *,
        with_bias: bool = False,
        whole_change: bool = False,
        name: str = "module",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        outputs, width = expert.shape[0], expert.shape[1] - with_bias
        super().__init__(width, name, dtype, device)
        self._with_bias = with_bias
        self._expert = expert[:, :width].to(device, dtype)
        self._task_vector = task_vector[:, :width].to(device, dtype)
        self._change_of_bias = task_vector[:, width:].to(device, dtype).sum(1)  # zeros without one
        self._product = torch.zeros(outputs, width, dtype=dtype, device=device)
        self._product_sum, self._drift, self._change = (
            torch.zeros(outputs, dtype=torch.float64, device=device) for _ in range(3)
        )
        if whole_change:
            self._change = torch.zeros(outputs, outputs, dtype=dtype, device=device)

    def _add(
        self,
        expert: Tensor,
        merged: Tensor,
        drift: Tensor,
        drift_sum: Tensor,
        stream: Tensor | None,
        weights: Tensor | None,
        backend: str,
    ) -> None:
        accumulate_gram(self._gram, merged, weights, backend=backend)
        drifted = drift.to(self.dtype) @ self._expert.mT  # (rows, out)
        if stream is not None:
            drifted += stream
        counted = drifted if weights is None else drifted * weights[:, None]
        self._product.addmm_(counted.mT, merged.to(self.dtype))
        self._product_sum += counted.sum(0, dtype=torch.float64)
        self._drift += drifted.mul_(counted).sum(0, dtype=torch.float64)
        changed = torch.addmm(self._change_of_bias, expert.to(self.dtype), self._task_vector.mT)
        if self._change.dim() == 2:
            accumulate_gram(self._change, changed, weights, backend=backend)
        else:
            squares = changed.square_()
            self._change += (squares if weights is None else squares * weights[:, None]).sum(0, dtype=torch.float64)

    def _stream_rows(self, stream_drift: Tensor, rows: int) -> Tensor:
        outputs = self._expert.shape[0]
        if stream_drift.shape[-1] != outputs or stream_drift.numel() != rows * outputs:
            raise ShapeMismatchError(
                f"{self.name}: the drift of the residual stream has shape {tuple(stream_drift.shape)}; it needs {rows} rows of width {outputs}."
            )
        return stream_drift.detach().reshape(-1, outputs).to(self.dtype)

    def moments(self, *, with_bias: bool = False) -> ProjectedMoments:
        """With a bias where the modules were given with theirs, and only there. Raises `EmptyCalibrationError` without rows."""
        if with_bias != self._with_bias:
            raise ConfigError(f"{self.name}: was measured {'with' if self._with_bias else 'without'} biases.")
        gram, product = self._whole_gram(with_bias), self._product
        if with_bias:
            product = torch.cat([product, self._product_sum.to(self.dtype)[:, None]], 1)
        total = self._total(with_bias)
        return ProjectedMoments(
            gram, product, total, self._product_sum, self._drift, self._change, self.rows, self.name, with_bias
        )

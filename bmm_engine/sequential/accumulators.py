"""Add up, batch by batch, what an expert and the merged network read for the same tokens: into the moments that a solve needs (`moments.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from bmm_engine.errors import ConfigError, EmptyCalibrationError, NonFiniteGramError, ShapeMismatchError
from bmm_engine.ops.cross_gram import accumulate_cross_gram
from bmm_engine.ops.gram import accumulate_gram
from bmm_engine.sequential.moments import DriftMoments, ProjectedMoments, TaskMoments


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

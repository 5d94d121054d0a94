"""How much errors of a module's outputs count, by direction: the few in which they change the predictions, and all others alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError

RANK = 64
"""Directions of a sensitivity that are kept; the others count by their mean. A module with fewer outputs keeps all."""

OVERSAMPLING, ITERATIONS = 8, 2


@dataclass(frozen=True)
class OutputMetric:
    """`S = level I + V V^T` (out, out), level >= 0; `directions` V (out, rank)."""

    level: float
    directions: Tensor

    @property
    def outputs(self) -> int:
        return self.directions.shape[0]

    @classmethod
    def of(cls, matrix: Tensor, rank: int | None = None) -> OutputMetric:
        """A symmetric `matrix` (out, out), exactly; or with `rank` its largest eigenvalues, and the mean of the others in their place, so that the
        trace is kept. Eigenvectors of a large one by subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061).

        Raises `ConfigError` for a negative eigenvalue of one that is taken exactly."""
        outputs = len(matrix)
        if rank is None or outputs <= rank:
            values, vectors = torch.linalg.eigh(matrix)
            if values[0] < -10 * outputs * torch.finfo(matrix.dtype).eps * values.abs().max():
                raise ConfigError(
                    f"a metric of {outputs} outputs has the eigenvalue {values[0]:.3g}; give symmetric metrics with eigenvalues >= 0."
                )
            values = values.clamp(min=0)
            return cls(float(values[0]), vectors[:, 1:] * (values[1:] - values[0]).sqrt())
        values, vectors = _largest(matrix, rank)
        level = max(0.0, float(matrix.diagonal().sum() - values.sum()) / (outputs - rank))
        return cls(level, vectors * (values - level).clamp_(min=0).sqrt())

    def to(self, like: Tensor) -> OutputMetric:
        """On the device and in the dtype of `like`."""
        return OutputMetric(self.level, self.directions.to(like))

    def within(self, basis: Tensor) -> OutputMetric:
        """`Q^T S Q` (r, r) for an orthonormal `basis` Q (out, r)."""
        return OutputMetric(self.level, basis.mT @ self.directions)

    def scaled(self, by: float, level: float = 0.0) -> OutputMetric:
        """`by` (>= 0) times this, and `level` times the identity."""
        return OutputMetric(by * self.level + level, self.directions * math.sqrt(by))

    def dense(self) -> Tensor:
        product = self.directions @ self.directions.mT
        product.diagonal().add_(self.level)
        return product

    def times(self, x: Tensor) -> Tensor:
        """`S x` for x (out, n)."""
        return torch.addmm(x, self.directions, self.directions.mT @ x, beta=self.level)


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues of a symmetric matrix, and their vectors as columns."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), min(count + OVERSAMPLING, len(matrix)), generator=generator, dtype=torch.float64)
    basis = start.to(matrix)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, vectors = torch.linalg.eigh(basis.mT @ (matrix @ basis))
    return values[-count:], basis @ vectors[:, -count:]


def output_metrics(sensitivities: Sequence[Tensor], share: float, name: str) -> list[OutputMetric]:
    """The metrics of modules that are weighed together, from one task's sensitivities of them (out, out): scaled to a mean eigenvalue of 1 over all,
    then `share` of that and `1 - share` of the identity, for what so few samples do not show. Zero sensitivities give the identity.

    Of a sensitivity with more than `RANK` outputs that many directions are told apart.
    Raises `ConfigError` for a `share` outside [0, 1), in which alone the metric is sure to be positive definite.
    """
    check_share(share)
    outputs = sum(len(own) for own in sensitivities)
    trace = sum(float(own.diagonal().sum(dtype=torch.float64)) for own in sensitivities)
    if not math.isfinite(trace) or trace < 0:
        raise ConfigError(f"{name}: the trace of its sensitivity is {trace}; it must be finite and >= 0.")
    if trace == 0:
        return [OutputMetric(1.0, own.new_zeros(len(own), 0)) for own in sensitivities]
    return [OutputMetric.of(own, RANK).scaled(share * outputs / trace, 1 - share) for own in sensitivities]


def check_share(value: float) -> None:
    """Raise `ConfigError` unless it is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"the share of a sensitivity must be a number >= 0 and < 1, not {value!r}.")

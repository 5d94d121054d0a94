"""How much errors of a module's outputs count, by direction: the few in which they change the predictions, and all others alike.

It is measured, as a sensitivity (`bmm_engine.statistics.sensitivity`), or read off the task vector U (out, in) without data. The gradient of a
module is g x^T for its input x and its output's gradient g, and U is made of such steps: as `E[x x^T] ~ U^T U` (arXiv 2605.12843, Theorem 1), so,
seen from the other side, `E[g g^T] ~ U U^T`, which is the output's factor of K-FAC (arXiv 1503.05671).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError
from bmm_engine.ops.lowrank import LowRank
from bmm_engine.solving.frobenius import squared_norm
from bmm_engine.solving.moments import energy_factor

RANK = 64
"""Directions of a sensitivity that are kept; the others count by their mean. A module with fewer outputs keeps all."""

OVERSAMPLING, ITERATIONS = 8, 2
EXACT = 1024
"""Of a task vector's shorter side: up to it directions are those of a decomposition, beyond it of the iteration."""


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
        values, vectors = _largest_of(lambda x: matrix @ x, matrix, rank)
        level = max(0.0, float(matrix.diagonal().sum() - values.sum()) / (outputs - rank))
        return cls(level, vectors * (values - level).clamp_(min=0).sqrt())

    @classmethod
    def of_factor(cls, factor: Tensor, rank: int) -> OutputMetric:
        """`F F^T` of a `factor` F (out, k), as `of` with `rank`, but not formed where F is large. In float64; the iteration in F's own dtype."""
        outputs, width = factor.shape
        if outputs <= rank:
            return cls.of(factor.double() @ factor.double().mT)
        if outputs <= min(width, EXACT):
            wide = factor.double()
            values, vectors = (found[..., -rank:] for found in torch.linalg.eigh(wide @ wide.mT))
        elif width <= EXACT:
            wide = factor.double()
            values, vectors = (found[..., -rank:] for found in torch.linalg.eigh(wide.mT @ wide))
            # F v has the length sqrt(value): what is zero but for rounding has no direction.
            real = values > width * torch.finfo(values.dtype).eps * values[-1]
            values, vectors = values[real], (wide @ vectors[:, real]) / values[real].sqrt()
        else:
            values, vectors = _largest_of(lambda x: factor @ (factor.mT @ x), factor, rank)
            values, vectors = values.double().clamp_(min=0), vectors.double()
        level = max(0.0, squared_norm(factor) - float(values.sum())) / (outputs - rank)
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


def _largest_of(times: Callable[[Tensor], Tensor], like: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues of the symmetric matrix that `times` multiplies by, and their vectors as columns. It has the rows, dtype and
    device of `like`."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(like), min(count + OVERSAMPLING, len(like)), generator=generator, dtype=torch.float64)
    basis = start.to(like)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(times(basis)).Q
    values, vectors = torch.linalg.eigh(basis.mT @ times(basis))
    return values[-count:], basis @ vectors[:, -count:]


def output_metrics(
    sensitivities: Sequence[Tensor],
    share: float,
    name: str,
    task_vectors: Sequence[Tensor | LowRank] = (),
    hybrid: float = 0.0,
) -> list[OutputMetric]:
    """The metrics of modules that are weighed together, from one task's sensitivities of them (out, out): scaled to a mean eigenvalue of 1 over all,
    then `share` of that and `1 - share` of the identity, for what so few samples do not show. Zero sensitivities give the identity.

    `hybrid`: of `share`, the part g that the `task_vectors` U (out, in) of these modules have, `(1 - g) S / tr S + g U U^T / ||U||_F^2`.
    Of a sensitivity with more than `RANK` outputs that many directions are told apart.
    Raises `ConfigError` for a `share` outside [0, 1), in which alone the metric is sure to be positive definite.
    """
    given = list(sensitivities)
    if hybrid:
        given = _hybrid(given, [energy_factor(own.mT).mT for own in task_vectors], hybrid)
    trace = sum(float(own.diagonal().sum(dtype=torch.float64)) for own in given)
    return _weighed(given, trace, lambda own: OutputMetric.of(own, RANK), share, name)


def _hybrid(measured: Sequence[Tensor], factors: Sequence[Tensor], share: float) -> list[Tensor]:
    """Each of trace 1 over all modules; where either has no mass, the other alone."""
    trace = sum(float(own.diagonal().sum(dtype=torch.float64)) for own in measured)
    mass = sum(map(squared_norm, factors))
    if not (trace > 0 and mass > 0):
        return [own if trace > 0 else (f @ f.mT).to(own) for own, f in zip(measured, factors, strict=True)]
    parts = zip(measured, factors, strict=True)
    return [(own * ((1 - share) / trace)).add_((f @ f.mT).to(own), alpha=share / mass) for own, f in parts]


def task_vector_metrics(task_vectors: Sequence[Tensor | LowRank], share: float, name: str) -> list[OutputMetric]:
    """The same without data, from one task's vectors U (out, in) of these modules: `U U^T` in the place of a sensitivity. Of U as a product its
    factors are enough."""
    factors = [energy_factor(own.mT).mT for own in task_vectors]
    return _weighed(
        factors, sum(map(squared_norm, factors)), lambda own: OutputMetric.of_factor(own, RANK), share, name
    )


def _weighed(
    given: Sequence[Tensor], trace: float, metric_of: Callable[[Tensor], OutputMetric], share: float, name: str
) -> list[OutputMetric]:
    """`given`: a tensor (out, ...) of each module, whose metrics have `trace` together."""
    check_share(share)
    outputs = sum(len(own) for own in given)
    if not math.isfinite(trace) or trace < 0:
        raise ConfigError(f"{name}: the trace of its sensitivity is {trace}; it must be finite and >= 0.")
    if trace == 0:
        return [OutputMetric(1.0, own.new_zeros(len(own), 0)) for own in given]
    return [metric_of(own).scaled(share * outputs / trace, 1 - share) for own in given]


def check_share(value: float) -> None:
    """Raise `ConfigError` unless it is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"the share of a sensitivity must be a number >= 0 and < 1, not {value!r}.")

"""Draws from the posterior of a linear module, whose mode and mean is the MAP.

    W = W* + tau Z L^{-1},   A = L L^T,   Z standard normal (out, in):   independent rows of covariance tau^2 A^{-1}

    tau = temperature * sigma,   sigma^2 = sum_t beta_t tr((W* - W_t) G_t (W* - W_t)^T) / (out * sum_t beta_t)

sigma^2 is the mean squared error of the fit for each output feature, so the temperature has no unit: it means the same in every module, whatever
the Grams' normalisation. With n independent calibration rows for each task, theory says temperature^2 = 1 / n; rows are tokens, and those of one
text are anything but independent, so in practice it is chosen on validation data. Task weights count as data do: four times as large, they halve
the noise. Where experts agree sigma is 0, and a draw is the MAP.
A module at `alpha = inf` has no posterior: it is the anchor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.parallel import in_order
from bmm_engine.solving.moments import DenseMoment, Moment
from bmm_engine.solving.solve import Factor, map_problem, solve_with_factor

# Rows of W at a time: each block is one piece of work for one core.
BLOCK_ROWS = 256
# Of 256 samples, as many as calibration reads by default, were each one independent row.
DEFAULT_TEMPERATURE = 1 / 16


@dataclass(frozen=True)
class Posterior:
    """Draw number `index` of the series `seed`: its random numbers depend on these and the modules' names in the base, and on nothing else (how
    many are drawn, the order of modules, threads, device).

    `temperature` >= 0: see the module's text; 0 is the MAP. Raises `ConfigError`.
    """

    seed: int = 0
    index: int = 0
    temperature: float = DEFAULT_TEMPERATURE

    def __post_init__(self) -> None:
        for name in ("seed", "index"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"posterior: {name} must be a whole number >= 0, not {value!r}.")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"posterior: temperature must be finite and >= 0 (0: the MAP), not {self.temperature}.")

    def generator(self, module: str) -> torch.Generator:
        """Of the module's own stream of numbers, on the CPU. (torch's generator takes 32 bits of a seed.)"""
        digest = hashlib.blake2b(f"{self.seed}\0{self.index}\0{module}".encode(), digest_size=4).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class PosteriorSample:
    """`weight` (..., out, in) in the anchor's dtype; `tau` of each member of the batch, 0 where the draw is the MAP or the anchor itself."""

    weight: Tensor
    tau: list[float]


def residual_variance(
    weight: Tensor, experts: Sequence[Tensor], moments: Sequence[Moment], task_weights: Sequence[float]
) -> float:
    """`sigma^2 = sum_t beta_t tr((W - W_t) G_t (W - W_t)^T) / (out * sum_t beta_t)`, in float64. `weight` and experts (out, in)."""

    def part(rows: slice) -> Callable[[], float]:
        def work() -> float:
            wide, total = weight[rows].double(), 0.0
            for expert, moment, beta in zip(experts, moments, task_weights, strict=True):
                if beta:
                    gap = wide - expert[rows].double()
                    total += beta * float((moment.apply(gap) * gap).sum())
            return total

        return work

    width = weight.shape[1]
    read = 0 if all(isinstance(m, DenseMoment) and m.resident is not None for m in moments) else 4 * width * width
    tasks = ((3 * 8 * BLOCK_ROWS * width + read, part(rows)) for rows in _blocks(weight))
    total = sum(in_order(tasks, workers=_workers(weight)))
    return max(total, 0.0) / (weight.shape[0] * sum(task_weights))  # a float32 Gram may have eigenvalues just below 0


def posterior_scale(
    weight: Tensor,
    experts: Sequence[Tensor],
    moments: Sequence[Moment],
    factor: Factor,
    temperature: float,
    *,
    name: str = "module",
) -> float:
    """`tau = temperature * sigma` of the module whose MAP is `weight` (out, in).

    Raises `ConfigError` where A was singular but for a jitter: there the draw would be of the jitter's making.
    """
    tau = temperature * math.sqrt(residual_variance(weight, experts, moments, factor.task_weights))
    if tau and factor.jitter:
        raise ConfigError(
            f"{name}: there is no posterior to sample from: A was not positive definite at ridge {factor.ridge:.3g} (jitter {factor.jitter:.3g} was"
            " added), so its inverse is anything. Use a larger alpha."
        )
    return tau


def posterior_sample(weight: Tensor, factor: Factor, tau: float, generator: torch.Generator) -> Tensor:
    """`W* + tau Z L^{-1}` (out, in) in the dtype of the MAP `weight`, by blocks of rows. The numbers Z come from `generator`, a CPU one."""
    out = torch.empty_like(weight)

    def part(rows: slice, z: Tensor) -> Callable[[], None]:
        def work() -> None:
            noise = torch.linalg.solve_triangular(factor.lower, z.to(weight.device), upper=False, left=False)
            out[rows] = noise.mul_(tau).add_(weight[rows])

        return work

    def draws() -> Iterator[tuple[int, Callable[[], None]]]:
        for rows in _blocks(weight):
            # float64: what torch makes of float32 depends on the CPU's instruction set.
            z = torch.randn(weight[rows].shape, generator=generator, dtype=torch.float64)
            yield 2 * 8 * z.numel(), part(rows, z)

    for _ in in_order(draws(), workers=_workers(weight)):
        pass
    return out


def _blocks(weight: Tensor) -> Iterator[slice]:
    return (slice(start, start + BLOCK_ROWS) for start in range(0, weight.shape[0], BLOCK_ROWS))


def _workers(weight: Tensor) -> int:
    """Blocks at a time, each on one thread; a GPU works on one, while the next one's numbers are drawn."""
    return torch.get_num_threads() if weight.device.type == "cpu" else 1


@accepts_dlpack
def sample_posterior(
    anchor: Tensor,
    experts: Sequence[Tensor] | Tensor,
    grams: Sequence[Tensor] | Sequence[Moment] | Tensor,
    posterior: Posterior,
    *,
    alpha: float | None = None,
    ridge: float | None = None,
    task_weights: Sequence[float] | str | None = None,
    base: Tensor | None = None,
    name: str = "module",
) -> PosteriorSample:
    """A draw from the posterior of one linear module, or of each of a batch, in the place of `solve_map`'s weight.

    Arguments and errors as of `solve_map`; `ConfigError` too where A needed jitter. `name` decides the stream of random numbers: give each
    module its own (the members of a batch are name[0], name[1], ...). `alpha = inf` gives the anchor.
    """
    problem = map_problem(anchor, experts, grams, task_weights=task_weights, base=base, name=name)
    if alpha == math.inf:
        return PosteriorSample(anchor.clone(), [0.0] * len(problem.names))
    factors = problem.factorize(alpha=alpha, ridge=ridge)
    weights, taus = [], []
    for own, start, tuned, moments, factor in zip(problem.names, *problem.members, factors, strict=True):
        weight = solve_with_factor(start, tuned, moments, factor)
        tau = 0.0
        if posterior.temperature:
            tau = posterior_scale(weight, tuned, moments, factor, posterior.temperature, name=own)
            weight = posterior_sample(weight, factor, tau, posterior.generator(own))
        weights.append(weight)
        taus.append(tau)
    return PosteriorSample(torch.stack(weights) if anchor.dim() == 3 else weights[0], taus)

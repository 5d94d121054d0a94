"""Merging rules in float64, straight from their formulas: what both programs of `python -m bench anchors` are held to.

`W_0` base, `W_t` expert, `tau_t = W_t - W_0`. A `Truth` also says where the formula decides. A rule that keeps the entries above an order statistic
leaves open which of several equal ones it keeps, and 16-bit weights have many; entries near a threshold, or near a change of sign, do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative width of what is near: bfloat16 arithmetic, the rival's, moves a difference of two weights by 2^-9 at most, and a sum of some by more.
NEAR = 2.0**-6


@dataclass(frozen=True)
class Truth:
    merged: Tensor
    decided: Tensor | bool = True


Formula = Callable[[Tensor, Sequence[Tensor]], Truth]


def linear(weights: Sequence[float]) -> Formula:
    """`sum_t w_t W_t / sum_t w_t` (arXiv 2203.05482)."""
    return lambda base, experts: Truth(sum(w * e for w, e in zip(weights, experts, strict=True)) / sum(weights))


def task_arithmetic(weights: Sequence[float]) -> Formula:
    """`W_0 + sum_t w_t tau_t` (arXiv 2212.04089)."""
    return lambda base, experts: Truth(base + sum(w * (e - base) for w, e in zip(weights, experts, strict=True)))


def ties(density: float, thresholds: Sequence[float] | None = None) -> Formula:
    """The mean of what agrees with the elected sign, of the top `density` of each task (arXiv 2306.01708), by tensor or above `thresholds`."""

    def truth(base: Tensor, experts: Sequence[Tensor]) -> Truth:
        taus, decided = [e - base for e in experts], torch.ones_like(base, dtype=torch.bool)
        limits = [kept_from(tau, density) for tau in taus] if thresholds is None else thresholds
        for tau, limit in zip(taus, limits, strict=True):
            magnitude = tau.abs()
            decided &= ~_near(magnitude, limit)
            tau[magnitude < limit] = 0
        total = sum(taus)
        sign = torch.where(total >= 0, 1.0, -1.0)
        decided &= (total.abs() > NEAR * sum(tau.abs() for tau in taus)) | (sum(tau != 0 for tau in taus) == 0)
        agreeing = [torch.where(tau.sign() == sign, tau, 0.0) for tau in taus]
        return Truth(base + sum(agreeing) / sum(a != 0 for a in agreeing).clamp(min=1), decided)

    return truth


def breadcrumbs(density: float, gamma: float, weights: Sequence[float]) -> Formula:
    """`W_0 + sum_t w_t tau_t` without the top `gamma` of each tensor's entries and the bottom `1 - density - gamma` (arXiv 2312.06795)."""

    def truth(base: Tensor, experts: Sequence[Tensor]) -> Truth:
        merged, decided = base.clone(), torch.ones_like(base, dtype=torch.bool)
        for weight, expert in zip(weights, experts, strict=True):
            tau = expert - base
            magnitude = tau.abs()
            low, high = kept_from(tau, density + gamma), kept_from(tau, gamma)
            decided &= ~(_near(magnitude, low) | _near(magnitude, high))
            merged += weight * torch.where((magnitude >= low) & (magnitude < high), tau, 0.0)
        return Truth(merged, decided)

    return truth


def sce(select: float) -> Formula:
    """Select the `select` share of largest variance over tasks, weigh tasks by their square, erase what is against the sum (arXiv 2408.07990)."""

    def truth(base: Tensor, experts: Sequence[Tensor]) -> Truth:
        taus = torch.stack([e - base for e in experts])
        variance = taus.var(0, unbiased=False)
        limit = kept_from(variance, select * float((variance != 0).double().mean()))
        decided = ~_near(variance, limit, 4 * NEAR)
        taus *= variance >= limit
        weights = taus.square().flatten(1).mean(1)
        weights = (weights / weights.sum()).reshape(-1, *[1] * base.dim())
        total = taus.sum(0)
        decided &= (total.abs() > NEAR * taus.abs().sum(0)) | (variance < limit)
        kept = weights * (taus.sign() == torch.where(total >= 0, 1.0, -1.0))
        return Truth(base + (kept * taus).sum(0) / kept.sum(0).clamp(min=1e-6), decided)

    return truth


def slerp(t: float) -> Formula:
    """`(sin((1-t) theta) W_0 + sin(t theta) W_1) / sin theta` (Shoemake 1985)."""

    def truth(base: Tensor, experts: Sequence[Tensor]) -> Truth:
        angle = math.acos(_cosine(base, experts[0]))
        return Truth((math.sin((1 - t) * angle) * base + math.sin(t * angle) * experts[0]) / math.sin(angle))

    return truth


def model_stock(base: Tensor, experts: Sequence[Tensor]) -> Truth:
    """`t mean(W_t) + (1-t) W_0`, `t = T c / (1 + (T-1) c)`, c the mean cosine of two task vectors (arXiv 2403.19522)."""
    taus, count = [e - base for e in experts], len(experts)
    cosines = [_cosine(taus[i], taus[j]) for i in range(count) for j in range(i)]
    c = sum(cosines) / len(cosines)
    t = count * c / (1 + (count - 1) * c)
    return Truth(t * sum(experts) / count + (1 - t) * base)


def karcher(base: Tensor, experts: Sequence[Tensor]) -> Truth:
    """The mean norm times the point of the sphere that has the least sum of squared angles to the experts."""
    norms = [float(e.norm()) for e in experts]
    units = [e / norm for e, norm in zip(experts, norms, strict=True)]
    mean = sum(units)
    mean /= mean.norm()
    for _ in range(50):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = _cosine(mean, unit)
            tangent += math.acos(cosine) / math.sqrt(1 - cosine**2) * (unit - cosine * mean) / len(units)
        step = float(tangent.norm())
        if step < 1e-12:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
    return Truth(sum(norms) / len(norms) * mean)


def kept_from(values: Tensor, density: float) -> float:
    """The least magnitude among the top `density` of `values`."""
    return smallest_kept(values.abs().flatten(), density)


def smallest_kept(magnitudes: Tensor, density: float) -> float:
    """The least of the top `density` of a flat tensor, which is put into another order."""
    position = magnitudes.numel() - max(1, int(density * magnitudes.numel()))
    magnitudes.numpy().partition(position)
    return float(magnitudes[position])


def _near(values: Tensor, limit: float, width: float = NEAR) -> Tensor:
    return (values - limit).abs() <= width * limit


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))

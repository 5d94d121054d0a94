"""Normalisations (LayerNorm, RMSNorm): gains and biases by the same least squares, feature by feature.

A normalisation gives `o + g h (+ b)` for a feature, with h the normalised input and o what it gives at zero gain. With h~ and o~ of the merged
network's inputs and y_t what expert t's normalisation gives on its own,

    g*, b* = argmin  sum_t beta_t / n_t sum_rows (o~ + g h~ + b - y_t)^2 + lam ((g - g_a)^2 + (b - b_a)^2).

Where only a share a of the drift is corrected, y_t is a times that and (1 - a) times what the expert's gives on the merged network's inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bmm_engine.checkpoint import TensorSource
from bmm_engine.errors import CollectionError, EmptyCalibrationError, NonFiniteGramError
from bmm_engine.merging.inputs import Inputs
from bmm_engine.merging.plan import MergePlan
from bmm_engine.merging.stream import InputRecord
from bmm_engine.models.architecture import is_head
from bmm_engine.sequential.modules import Solved
from bmm_engine.sequential.solve import relative_residuals
from bmm_engine.solving.solve import overshot, relative_ridge
from bmm_engine.solving.task_weights import choose_task_weights


def is_norm(module: nn.Module) -> bool:
    """Does it normalise the last dimension, with a gain for each feature and perhaps a bias?"""
    kind = type(module).__name__.lower()
    names = {name for name, _ in module.named_parameters()}
    weight: Any = getattr(module, "weight", None)
    others = any(word in kind for word in ("batch", "group", "instance"))
    return "norm" in kind and not others and names in ({"weight"}, {"weight", "bias"}) and weight.dim() == 1


@dataclass(frozen=True)
class Norm:
    """A normalisation of the live model (a copy of the module, which nobody listens to), and its tensors by the base's names."""

    name: str
    module: nn.Module
    weight: str
    bias: str | None

    def run(self, rows: Tensor, weight: Any, bias: Any) -> Tensor:
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return functional_call(self.module, tensors, (rows,))


def find_norms(model: nn.Module, names: Mapping[str, str], plan: MergePlan) -> dict[str, Norm]:
    """The normalisations of a live model whose tensors are merged, by live name; heads have none. `names`: base tensor name -> live name."""
    merged = {live: name for name, live in names.items() if name in set(plan.alignment.merged)}
    found = {}
    for live, module in model.named_modules():
        if is_norm(module) and f"{live}.weight" in merged and not is_head(live, model):
            has_bias = getattr(module, "bias", None) is not None
            if not has_bias or f"{live}.bias" in merged:
                found[live] = Norm(live, copy.deepcopy(module), merged[f"{live}.weight"], merged.get(f"{live}.bias"))
    return found


class NormAccumulator:
    """One task's sums over rows, for each feature, in float64."""

    def __init__(
        self, norm: Norm, expert: Sequence[Tensor | None], base: Sequence[Tensor | None], drift_share: float = 1.0
    ):
        """`expert`, `base`: weight and bias (in,), in the dtype of the rows. `drift_share`: of the drift, how much is corrected."""
        self.drift_share = drift_share
        self.norm, self.name, self.width = norm, norm.name, int(norm.module.get_parameter("weight").shape[0])
        self.rows = 0
        self.change = 0.0
        self._expert, self._base = expert, base
        weight = expert[0]
        assert weight is not None
        zeros = torch.zeros_like(weight)
        no_bias = None if norm.bias is None else zeros
        self._zero, self._one = (zeros, no_bias), (torch.ones_like(weight), no_bias)
        sums = torch.zeros(5, self.width, dtype=torch.float64, device=weight.device)
        self.hh, self.h, self.hz, self.z, self.zz = sums

    def update(self, expert: Tensor, merged: Tensor) -> None:
        """Add rows (..., in) that the expert's normalisation and the merged network's read. Raises `NonFiniteGramError`, `CollectionError`."""
        run = self.norm.run
        target, before = run(expert, *self._expert).double(), run(expert, *self._base).double()
        offset = run(merged, *self._zero).double()
        h = run(merged, *self._one).double() - offset
        aim = target
        if self.drift_share != 1:
            there = run(merged, *self._expert).double()
            aim = there + self.drift_share * (target - there)
        z = aim - offset
        if not (bool(torch.isfinite(h.sum())) and bool(torch.isfinite(z.sum()))):
            count = int((~torch.isfinite(expert).all(-1)).sum() + (~torch.isfinite(merged).all(-1)).sum())
            raise NonFiniteGramError(
                f"{self.name}: {count} of the rows that it reads hold NaN or infinity. Check the calibration batch, or run the models in float32.",
                module=self.name,
                count=count,
            )
        if self.rows == 0:
            self._check(merged, h, offset)
        h, z = h.reshape(-1, self.width), z.reshape(-1, self.width)
        self.hh += h.square().sum(0)
        self.h += h.sum(0)
        self.hz += (h * z).sum(0)
        self.z += z.sum(0)
        self.zz += z.square().sum(0)
        self.change += float((target - before).square().sum())
        self.rows += h.shape[0]

    @property
    def size(self) -> float:
        """The Frobenius norm of the mean second moments of h (and the bias's 1), of all features together."""
        squares = float((self.hh / self.rows).square().sum())
        if self.norm.bias is not None:
            squares += float((1 + 2 * (self.h / self.rows).square()).sum())
        return math.sqrt(squares)

    def _check(self, rows: Tensor, h: Tensor, offset: Tensor) -> None:
        weight, bias = self._one
        twice = self.norm.run(rows, 2 * weight, bias).double()
        if not torch.allclose(twice, offset + 2 * h, rtol=1e-3, atol=1e-3):
            raise CollectionError(
                f"{self.name}: {type(self.norm.module).__name__} is not linear in its gain, so it cannot be fitted; use norms: anchor."
            )


class NormSolver:
    """Fits gains and biases against an anchor's tensors."""

    def __init__(self, plan: MergePlan, inputs: Inputs, anchor: TensorSource, prior: float = 1.0):
        """`prior`: how far the ridge pulls, as of modules."""
        self.settings, self.inputs, self.anchor, self.prior = plan.settings, inputs, anchor, prior

    def accumulator(self, norm: Norm, t: int, dtype: torch.dtype) -> NormAccumulator:
        expert, base = (
            [None if name is None else self.inputs.load(source, name).to(dtype) for name in (norm.weight, norm.bias)]
            for source in (self.inputs.experts[t], self.inputs.base)
        )
        return NormAccumulator(norm, expert, base, self.settings.sequential.drift)

    def solve(self, stage: str, norm: Norm, measured: Sequence[NormAccumulator], out: Solved) -> None:
        """Raises `EmptyCalibrationError`, `ConfigError`."""
        inputs, tasks = self.inputs, len(measured)
        for own in measured:
            if own.rows == 0:
                raise EmptyCalibrationError(
                    f"{norm.name}: no rows were measured; give calibration data that is not all padding."
                )
        depth = inputs.depth(norm.weight)
        alpha = self.settings.alpha_setting.at(norm.weight, depth, tasks)
        scale = self.settings.scale_setting.at(norm.weight, depth, tasks)
        energies = [own.change / own.rows for own in measured]
        betas = choose_task_weights(inputs.task_weights, energies, (own.size for own in measured), tasks, norm.name)
        gain = self._prior(norm.weight, alpha)
        bias = torch.zeros_like(gain) if norm.bias is None else self._prior(norm.bias, alpha)
        fitted_gain, fitted_bias, ridge = fit_norm(gain, bias, measured, betas, alpha, norm.bias is not None)
        before, after = (
            inputs.listed(relative_residuals([_misfit(own, *pair) for own in measured], energies))
            for pair in ((gain, bias), (fitted_gain, fitted_bias))
        )
        names, listed = (norm.weight.removesuffix(".weight"),), inputs.listed(betas)
        change = inputs.listed(energies)
        out.inputs.append(InputRecord(stage, names, alpha, ridge, 0.0, listed, before, after, change, change))
        for name, fitted in ((norm.weight, fitted_gain), (norm.bias, fitted_bias)):
            if name is not None:
                base = inputs.load(inputs.base, name)
                merged = fitted.to(base.dtype)
                out.tensors[name] = merged if scale == 1 or ridge == math.inf else base + scale * (merged - base)

    def _prior(self, name: str, alpha: float) -> Tensor:
        """What the ridge pulls towards; at an infinite one the anchor."""
        anchor = self.inputs.load(self.anchor, name).double()
        if alpha == math.inf or self.prior == 1:
            return anchor
        return overshot(anchor, self.inputs.load(self.inputs.base, name).double(), self.prior)


def fit_norm(
    gain: Tensor,
    bias: Tensor,
    measured: Sequence[NormAccumulator],
    task_weights: Sequence[float],
    alpha: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor, float]:
    """Gain and bias (in,) solved towards those of the anchor, with or without the bias, and the ridge; float64."""
    if alpha == math.inf:
        return gain, bias, math.inf
    shares = [beta / own.rows for beta, own in zip(task_weights, measured, strict=True)]

    def total(key: str) -> Tensor:
        return torch.stack([share * getattr(own, key) for share, own in zip(shares, measured, strict=True)]).sum(0)

    hh, h, ones = total("hh"), total("h"), sum(task_weights)
    mean = float(hh.mean())
    ridge = relative_ridge(alpha, mean + ones, 2) if with_bias else relative_ridge(alpha, mean, 1)
    to_gain = total("hz") - gain * hh - bias * h
    if not with_bias:
        return gain + to_gain / (hh + ridge), bias, ridge
    to_bias = total("z") - gain * h - bias * ones
    a, d = hh + ridge, ones + ridge
    determinant = a * d - h * h
    return (
        gain + (d * to_gain - h * to_bias) / determinant,
        bias + (a * to_bias - h * to_gain) / determinant,
        ridge,
    )


def _misfit(own: NormAccumulator, gain: Tensor, bias: Tensor) -> float:
    """`sum over features of mean (g h + b - z)^2`."""
    squares = gain.square() * own.hh + own.rows * bias.square() + own.zz
    mixed = gain * bias * own.h - gain * own.hz - bias * own.z
    return max(0.0, float((squares + 2 * mixed).sum())) / own.rows

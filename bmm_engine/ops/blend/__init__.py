"""Elementwise merging of tensors in one pass over memory: masks, sign elections and sums of task vectors."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, NonFiniteWeightError, ShapeMismatchError
from bmm_engine.ops import _dispatch
from bmm_engine.ops._checks import STORED, check_dtype, check_like, result_dtype
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.ops.blend import cpu, reference
from bmm_engine.ops.blend.rule import COMBINES, Part, Rule

IMPLEMENTATIONS = {"torch": reference, "cpu": cpu}

Bounds = Sequence[float | None] | None
Keep = Sequence[float | tuple[float, float] | None] | None


@accepts_dlpack
def blend(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    combine: str = "sum",
    weights: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    lower: Bounds = None,
    upper: Bounds = None,
    keep: Keep = None,
    seeds: Sequence[int] | None = None,
    ranks: Sequence[Tensor | None] | None = None,
    first: int = 0,
    inverse: bool = False,
    normalize: bool = False,
    tie: float = 1.0,
    unique: Sequence[float] | None = None,
    dominance: Sequence[float] | None = None,
    votes: int = 2,
    scaling: float = 1.0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`W = W_0 + a m`, where m combines what the experts contribute, element by element.

    Expert t differs from the base by d = W_t - W_0. It is *kept* where lower_t <= |d| <= upper_t (in float32) and, if
    `keep` says so, by chance; where it is kept it contributes v_t = weight_t scale_t d (with `inverse`, over the
    probability that it was kept with), elsewhere 0. Then m is, by `combine`:

    * "sum": sum_t v_t, as in task arithmetic (Ilharco et al. 2023, arXiv 2212.04089).
    * "elect_sum", "elect_count": with the sign s of sum_t v_t, or of sum_t sign(v_t), `tie` in place of 0: the sum of
      the v_t whose sign is s, with `normalize` over the sum of their weights (TIES, Yadav et al. 2023, arXiv 2306.01708).
    * "largest": the v_t of the largest magnitude, the later of equals (MagMax, Marczak et al. 2024, arXiv 2407.06322).
    * "mean_kept": unique_t v_t where t alone is kept, else the mean of v_t over the n experts that are.
    * "consensus": S = sum_t v_t where at least `votes` experts have |v_t| > dominance_t |S - v_t|, else 0 (Wang et al.
      2024, arXiv 2405.07813).

    All is computed in float64 if an input is float64, else in float32, each sum in the order of the experts, and
    rounded once (from float64 to 16 bits through float32, as torch does). Bits do not depend on the number of threads,
    nor on how a tensor is cut into slices, as long as each slice comes with its `first`.

    Args:
        base: W_0, any shape; float32, bfloat16, float16 or float64.
        experts: T >= 1 tensors W_t of that shape, of any of those dtypes each, on the device of base.
        combine: the rule, see above.
        weights, scales: T finite numbers each, by default 1.
        lower, upper: T numbers each, None for no bound; the bounds belong to the interval.
        keep: T probabilities p_t in [0, 1], or pairs (low, high) for p_t = low + (high - low) * ranks[t], or None for
            an expert that nothing is left to chance of. Element i is kept if u(seeds[t], first + i) < p_t, in float32.
        seeds: T integers in [0, 2^64), needed with `keep`: equal seeds give equal u. u is the 24 upper bits of
            SplitMix64 of seed and index.
        ranks: T float32 tensors in [0, 1] of the shape of base, needed where `keep` holds a pair.
        first: >= 0, the index of the first element: that of a slice within its tensor, in row-major order.
        inverse: divide what is kept by chance by its own probability, as DELLA does (Deep et al. 2024, arXiv 2406.11617).
        normalize: of the elections, see above; a sum of weights of 0 counts as 1.
        tie: 1 or -1, of the elections.
        unique: T finite numbers, of "mean_kept"; by default 1.
        dominance: T numbers >= 0, of "consensus", which needs them.
        votes: >= 1, of "consensus".
        scaling: a, finite.
        out_dtype: the dtype of W, by default that of `out`, else the one computed in.
        out: where W goes; it may be base or one of the experts, but must not overlap one otherwise.
        backend: "auto", "torch" or "cpu".

    Returns:
        W: `out` where it is given.

    Raises:
        NonFiniteWeightError: base or an expert holds NaN or infinity; its `index` is 0 for base and t + 1 for expert
            t, the first of them. `out` then holds anything.
        ShapeMismatchError: a tensor of another shape, T differing.
        ConfigError: no experts, a dtype or device that does not fit, a number out of range, an option that does not
            go with `combine`, an unknown backend.
        BackendError: the backend asked for cannot run this call.
    """
    _check_tensors(base, experts, out)
    if combine not in COMBINES:
        raise ConfigError(f"combine must be one of {', '.join(COMBINES)}, not {combine!r}")
    _check_belongs("normalize", normalize, combine, "elect_sum", "elect_count")
    _check_belongs("unique", unique is not None, combine, "mean_kept")
    _check_belongs("dominance", dominance is not None, combine, "consensus")
    if combine == "consensus" and dominance is None:
        raise ConfigError("combine='consensus' needs dominance, one number for each expert")
    if tie not in (1, -1):
        raise ConfigError(f"tie must be 1 or -1, and is {tie}")
    if votes < 1:
        raise ConfigError(f"votes must be at least 1, and is {votes}")
    if not math.isfinite(scaling):
        raise ConfigError(f"scaling must be finite, and is {scaling}")
    if first < 0:
        raise ConfigError(f"first must be >= 0, and is {first}")
    parts = _parts(base, len(experts), weights, scales, lower, upper, keep, seeds, ranks, unique, dominance)
    if inverse and keep is None:
        raise ConfigError("inverse divides by the probabilities in keep; give keep")
    rule = Rule(parts, combine, first, inverse, normalize, float(tie), votes, float(scaling))
    dtype = result_dtype(out_dtype, out, STORED, (base, *experts))
    out = torch.empty(base.shape, dtype=dtype, device=base.device) if out is None else out
    tensors = [base, *experts, out, *(part.ranks for part in parts if part.ranks is not None)]
    implementation = _dispatch.select("blend", IMPLEMENTATIONS, backend, base.device, tensors)
    if base.numel():
        not_finite = implementation.blend(base, experts, rule, out)
        if not_finite is not None:
            _fail([base, *experts], not_finite, out)
    return out


@accepts_dlpack
def sign_balance(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    lower: Bounds = None,
    upper: Bounds = None,
    backend: str = "auto",
) -> int:
    """The sum over all elements of sign(sum_t v_t), exactly: whether the signs that TIES elects are plus in the majority.

    Arguments, v_t and errors are those of `blend`.
    """
    _check_tensors(base, experts, None)
    parts = _parts(base, len(experts), weights, scales, lower, upper, None, None, None, None, None)
    implementation = _dispatch.select("blend", IMPLEMENTATIONS, backend, base.device, [base, *experts])
    if not base.numel():
        return 0
    not_finite, balance = implementation.sign_balance(base, experts, parts)
    if not_finite is not None:
        _fail([base, *experts], not_finite, None)
    return int(balance)


@accepts_dlpack
def magnitude_sums(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    lower: Bounds = None,
    upper: Bounds = None,
    keep: Keep = None,
    seeds: Sequence[int] | None = None,
    ranks: Sequence[Tensor | None] | None = None,
    first: int = 0,
    backend: str = "auto",
) -> list[tuple[float, float]]:
    """Per expert the sum of |d| over all elements, and over those that are kept: the L1 norms before and after masking.

    In float64; the CPU kernel adds in an order that does not depend on the number of threads. Arguments, d and errors are those of `blend`.
    """
    _check_tensors(base, experts, None)
    if first < 0:
        raise ConfigError(f"first must be >= 0, and is {first}")
    parts = _parts(base, len(experts), None, None, lower, upper, keep, seeds, ranks, None, None)
    tensors = [base, *experts, *(part.ranks for part in parts if part.ranks is not None)]
    implementation = _dispatch.select("blend", IMPLEMENTATIONS, backend, base.device, tensors)
    if not base.numel():
        return [(0.0, 0.0)] * len(experts)
    not_finite, sums = implementation.magnitude_sums(base, experts, parts, first)
    if not_finite is not None:
        _fail([base, *experts], not_finite, None)
    return list(sums)


def _check_tensors(base: Tensor, experts: Sequence[Tensor], out: Tensor | None) -> None:
    if not experts:
        raise ConfigError("a blend needs at least one expert")
    for name, tensor in [
        ("base", base),
        *((f"experts[{t}]", expert) for t, expert in enumerate(experts)),
        *([] if out is None else [("out", out)]),
    ]:
        check_like(name, tensor, "base", base)
        check_dtype(name, tensor.dtype, STORED)


def _check_belongs(name: str, given: bool, combine: str, *owners: str) -> None:
    if given and combine not in owners:
        raise ConfigError(f"{name} belongs to combine={' or '.join(map(repr, owners))}, and combine is {combine!r}")


def _parts(
    base: Tensor,
    count: int,
    weights: Sequence[float] | None,
    scales: Sequence[float] | None,
    lower: Bounds,
    upper: Bounds,
    keep: Keep,
    seeds: Sequence[int] | None,
    ranks: Sequence[Tensor | None] | None,
    unique: Sequence[float] | None,
    dominance: Sequence[float] | None,
) -> tuple[Part, ...]:
    """The options of each of the `count` experts. Raises what `blend` documents."""
    numbers = {"weights": weights, "scales": scales, "unique": unique, "dominance": dominance}
    others = {"lower": lower, "upper": upper, "keep": keep, "seeds": seeds, "ranks": ranks}
    for name, values in (numbers | others).items():
        if values is not None and len(values) != count:
            raise ShapeMismatchError(f"{len(values)} {name} for {count} experts; give one for each")
    for name, some in numbers.items():
        for t, value in enumerate(some or ()):
            if not math.isfinite(value) or (name == "dominance" and value < 0):
                raise ConfigError(f"{name}[{t}] must be finite{' and >= 0' * (name == 'dominance')}, and is {value}")
    if keep is not None and seeds is None:
        raise ConfigError("keep needs seeds, one for each expert")
    parts = []
    for t in range(count):
        weight = 1.0 if weights is None else float(weights[t])
        probability, rank = (None if keep is None else keep[t]), (None if ranks is None else ranks[t])
        parts.append(
            Part(
                factor=weight * (1.0 if scales is None else float(scales[t])),
                weight=weight,
                lower=_bound("lower", t, lower, -math.inf),
                upper=_bound("upper", t, upper, math.inf),
                keep=_probability(t, probability, rank),
                seed=0 if probability is None or seeds is None else _seed(t, seeds[t]),
                ranks=None if rank is None else _ranks(t, rank, base),
                unique=1.0 if unique is None else float(unique[t]),
                dominance=0.0 if dominance is None else float(dominance[t]),
            )
        )
    return tuple(parts)


def _float32(value: float) -> float:
    """The nearest float32, infinity beyond the largest."""
    return ctypes.c_float(value).value


def _bound(name: str, t: int, bounds: Bounds, absent: float) -> float:
    value = None if bounds is None else bounds[t]
    if value is None:
        return absent
    if math.isnan(value):
        raise ConfigError(f"{name}[{t}] is NaN; give a number, or None for no bound")
    return _float32(value)


def _probability(
    t: int, probability: float | tuple[float, float] | None, ranks: Tensor | None
) -> tuple[float, float] | None:
    if probability is None:
        if ranks is not None:
            raise ConfigError(f"ranks[{t}] is given, but keep is not, which it belongs to")
        return None
    pair = not isinstance(probability, (int, float))
    low, high = (probability, probability) if isinstance(probability, (int, float)) else probability
    if not (0 <= low <= 1 and 0 <= high <= 1):
        raise ConfigError(f"keep[{t}] must be in [0, 1], and is {probability}")
    if pair != (ranks is not None):
        raise ConfigError(f"keep[{t}] is {probability}: a pair goes with ranks[{t}], a number without")
    return _float32(low), _float32(high - low)


def _seed(t: int, seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seeds[{t}] must be in [0, 2^64), and is {seed}")
    return int(seed)


def _ranks(t: int, ranks: Tensor, base: Tensor) -> Tensor:
    check_like(f"ranks[{t}]", ranks, "base", base)
    if ranks.dtype != torch.float32:
        raise ConfigError(f"ranks[{t}] must be float32, not {ranks.dtype}")
    return ranks


def _fail(inputs: Sequence[Tensor], index: int, out: Tensor | None) -> NoReturn:
    name, tensor = "base" if index == 0 else f"experts[{index - 1}]", inputs[index]
    many = f"{tensor.numel() - int(tensor.isfinite().sum())} of {tensor.numel()} entries of"
    if out is not None and tensor.data_ptr() == out.data_ptr():  # overwritten
        many = "entries of"
    raise NonFiniteWeightError(f"{many} {name} {tuple(tensor.shape)} are NaN or infinite", index=index)

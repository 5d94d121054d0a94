"""PCB: entries weighed by their rank within their task and their agreement with the others (arXiv 2410.02396), over the flat task vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.anchors.contract import Model, anchor
from bmm_engine.anchors.domains import PositiveShare
from bmm_engine.anchors.select import OrderStatistic, Pass, difference, order_statistics, over
from bmm_engine.anchors.settings import PerExpert, each

# exp(T) has to be a float32.
_MOST_EXPERTS = 88
# Worked on at a time, with three float64 temporaries for each expert.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Tails:
    """Per task, over the model: the least and the largest magnitude that its entries are clipped to."""

    least: Sequence[float]
    most: Sequence[float]


@dataclass(frozen=True)
class PcbState:
    """The tails; per task, over the model, the balance that scores 0 and the one that scores 1."""

    tails: Tails
    threshold: Sequence[float]
    highest: Sequence[float]


def survey(model: Model) -> PcbState:
    """Two passes for the tails of the magnitudes, two for those of the balance; two more where a threshold is not above 0."""
    tasks = len(model.constant("weight"))
    clip, ratio, inter = model.constant("clip"), model.constant("ratio"), model.constant("inter")

    magnitudes = over(model, lambda site: [[(expert, site.base) for expert in site.experts]])
    ends = [lambda n: int(n * clip) + 1, lambda n: int(n * (1 - clip) - 1) + 1]
    clipped = order_statistics(magnitudes, [ends] * tasks)
    tails = Tails([low.value for low, _ in clipped], [high.value for _, high in clipped])

    def balances(sign: int) -> Pass:
        """What is positive of the balance, or of its negative."""
        return over(
            model,
            lambda site: (
                [(sign * b).clamp_(min=0) for b in _balance(own, tails, inter)]
                for own in _chunks(site.base, site.experts, tails)
            ),
        )

    def rank(n: int) -> int:
        return min(int(n * (1 - ratio)) + 1, n)

    found = order_statistics(balances(1), [[rank, lambda n: n]] * tasks)
    if all(low.value > 0 for low, _ in found):
        return PcbState(tails, [low.value for low, _ in found], [high.value for _, high in found])
    # Of what is not positive, the order is that of the magnitudes, reversed.
    below = order_statistics(balances(-1), [[lambda n: n + 1 - rank(n), lambda n: 1]] * tasks)

    def signed(positive: OrderStatistic, negative: OrderStatistic) -> float:
        return positive.value if positive.value > 0 else -negative.value

    pairs = list(zip(found, below, strict=True))
    return PcbState(tails, [signed(p[0], m[0]) for p, m in pairs], [signed(p[1], m[1]) for p, m in pairs])


@anchor(
    scope="model", elementwise=True, reduce=survey, experts=(1, _MOST_EXPERTS), paper="Du et al. 2024, arXiv 2410.02396"
)
def pcb(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    state: PcbState,
    weight: PerExpert[float] = each(1.0),
    scaling: float = 1.2,
    ratio: PositiveShare = 0.1,
    clip: Annotated[float, Field(ge=0, lt=0.5)] = 1e-4,
    inter: Literal["raw", "normalized"] = "raw",
) -> Tensor:
    """`W = W_0 + scaling sum_t s_t w_t tau^_t / sum_t s_t`: s_t from 0 to 1 scores what is large within its task and agrees with the others.

    tau^ has its magnitudes clipped to their `clip` tails, a = |tau^| rescaled to [0, 1]; the balance is `exp(T a^2) tanh(tau_t sum_s tau_s)`; its
    top `ratio` share over the model is s_t, rescaled to [0, 1], the rest 0. A task whose entries have all one magnitude has a = 0, one whose
    balance is all the same s_t = 0. `weight`: a factor of each task vector, for the search that the authors do.
    `inter`: "normalized" sums sign(tau_s) a_s in the tanh. The authors' form for vision: clip: 0.01, ratio: 0.05, inter: normalized.
    """
    out = base.clone(memory_format=torch.contiguous_format)
    for piece, tasks in zip(out.view(-1).split(_CHUNK), _chunks(base, experts, state.tails), strict=True):
        piece += scaling * _merged(tasks, state, weight, inter)
    return out


@dataclass(frozen=True)
class _Clipped:
    """A task vector and its clipped magnitudes, in float64: what is compared over passes must not depend on how a tensor is cut."""

    tau: Tensor
    magnitude: Tensor


def _chunks(base: Tensor, experts: Sequence[Tensor], tails: Tails) -> Iterator[list[_Clipped]]:
    """All tasks, some entries at a time."""
    flat = base.reshape(-1)
    flats = [expert.reshape(-1) for expert in experts]
    for start in range(0, max(flat.numel(), 1), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        taus = [difference(expert[chunk], flat[chunk]).double() for expert in flats]
        yield [
            _Clipped(tau, tau.abs().clamp_(least, most))
            for tau, least, most in zip(taus, tails.least, tails.most, strict=True)
        ]


def _merged(tasks: Sequence[_Clipped], state: PcbState, weight: Sequence[float], inter: str) -> Tensor:
    """`sum_t s_t w_t tau^_t / sum_t s_t`."""
    total = torch.zeros_like(tasks[0].tau)
    divisor = torch.zeros_like(total)
    for t, balance in enumerate(_balance(tasks, state.tails, inter)):
        low, span = state.threshold[t], state.highest[t] - state.threshold[t]
        if span > 0:
            score = ((balance - low) / span).clamp_(0, 1)
            total += score * weight[t] * tasks[t].tau.sign() * tasks[t].magnitude
            divisor += score
    return total / divisor.clamp_(min=1e-12)


def _balance(tasks: Sequence[_Clipped], tails: Tails, inter: str) -> Iterator[Tensor]:
    """Task by task `exp(T a^2) tanh(...)`, rounded to float32 as the order statistics are: what is at the threshold has to score exactly 0, since
    the scores' ratio counts however small they are."""
    strengths = [
        (task.magnitude - least) / (most - least) if most > least else torch.zeros_like(task.magnitude)
        for task, least, most in zip(tasks, tails.least, tails.most, strict=True)
    ]
    agreement = torch.zeros_like(tasks[0].tau)
    for task, strength in zip(tasks, strengths, strict=True):
        agreement += task.tau if inter == "raw" else task.tau.sign() * strength
    for task, strength in zip(tasks, strengths, strict=True):
        yield ((len(tasks) * strength.square()).exp_() * (task.tau * agreement).tanh_()).float().double()

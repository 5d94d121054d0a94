"""PCB against an oracle in float64, which sorts the flat vector."""

from __future__ import annotations

import pytest
import torch

from bmm_engine.anchors import get_anchor
from bmm_engine.errors import ConfigError
from tests.anchors.models import Tensors, error, flat_taus, merge, model_family, unflat


def rescaled(x):
    low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
    return torch.where(high > low, (x - low) / (high - low), 0.0)


def clipped(x, bottom, top):
    n, ordered = x.shape[1], x.sort(1).values
    return torch.clamp(x, ordered[:, [int(n * bottom)]], ordered[:, [int(n * (1 - top) - 1)]])


def oracle(tau, ratio=0.1, clip=1e-4, normalized=False, weight=None):
    """arXiv 2410.02396, over flat task vectors (T, n)."""
    magnitude = clipped(tau.abs(), clip, clip)
    strength = rescaled(magnitude)
    agreement = (tau.sign() * strength if normalized else tau).sum(0)
    balance = ((len(tau) * strength**2).exp() * (tau * agreement).tanh()).float().double()
    score = rescaled(clipped(balance, 1 - ratio, 0))
    w = torch.tensor(weight or [1.0] * len(tau), dtype=torch.float64)[:, None]
    return (score * w * tau.sign() * magnitude).sum(0) / score.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        ({}, 3),
        ({"ratio": 0.3, "weight": [0.8, 1.0, 1.3]}, 3),
        ({"ratio": 0.05, "clip": 0.01, "inter": "normalized"}, 8),
        ({"ratio": 0.9}, 4),  # the threshold is below 0
        ({"ratio": 1.0, "clip": 0.2}, 2),
        ({}, 1),
    ],
)
def test_matches_its_formula(given, tasks, rows):
    base, experts = model_family(tasks)
    flat = flat_taus(base, experts)
    options = {k: given[k] for k in ("ratio", "clip", "weight") if k in given}
    moved = 1.2 * oracle(flat, normalized=given.get("inter") == "normalized", **options)
    assert error(merge("pcb", base, experts, rows, **given), unflat(base, moved), base) < 1e-6


def test_a_task_that_opposes_all_others_has_a_negative_balance():
    """Two tasks against each other: the weaker one's balance is negative everywhere, its highest score included."""
    tau = torch.tensor([[4.0, 3.0, 2.0, 5.0, 1.0], [-1.0, -1.5, -0.5, -2.0, -0.75]])
    base = torch.zeros(5)
    for ratio in (0.1, 0.5, 0.9):
        expected = oracle(tau.double(), ratio, 0.0)
        got = get_anchor("pcb")(base, list(tau), ratio=ratio, clip=0.0, scaling=1.0)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)


def test_reads_the_model_four_times_or_six():
    base, experts = model_family()
    for ratio, passes in [(0.1, 4), (0.95, 6)]:
        model = Tensors(get_anchor("pcb"), base, experts, {"ratio": ratio})
        model.rule.reduce(model)
        assert model.passes == passes


def test_only_so_many_experts():
    with pytest.raises(ConfigError, match="1 to 88"):
        get_anchor("pcb")(torch.zeros(3), [torch.ones(3)] * 89)
    equal = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert bool(get_anchor("pcb")(torch.zeros(4), [equal] * 88).isfinite().all())


def test_more_entries_than_are_worked_on_at_a_time(monkeypatch):
    base, experts = model_family()
    at_once = merge("pcb", base, experts)
    monkeypatch.setattr("bmm_engine.anchors.pcb._CHUNK", 50)
    assert all(torch.equal(at_once[k], tensor) for k, tensor in merge("pcb", base, experts).items())

"""TIES, over the model and over tensors, against oracles in float64; selection by magnitude."""

from __future__ import annotations

import math

import pytest
import torch

from bmm_engine.anchors import get_anchor
from bmm_engine.anchors.select import exact_bounds, just_above, kth_smallest_magnitudes, order_statistics
from bmm_engine.errors import ConfigError
from tests.anchors.models import Tensors, error, family, flat_taus, merge, model_family, taus, unflat


def elected(flat, weight, count, majority, normalize):
    """The disjoint merge of trimmed task vectors (T, n)."""
    w = torch.tensor(weight, dtype=torch.float64)[:, None]
    v = w * flat
    sums = v.sum(0)
    sign = (v.sign().sum(0) if count else sums).sign()
    tie = (1.0 if sums.sign().sum() > 0 else -1.0) if majority else 1.0
    sign[sign == 0] = tie
    agrees = (v.sign() == sign) & (v != 0)
    divisor = (w * agrees).sum(0)
    divisor[divisor == 0] = 1
    return (v * agrees).sum(0) / (divisor if normalize else 1)


def model_oracle(flat, density, weight=None, scaling=1.0, count=False, majority=True, normalize=True):
    """By the authors' kthvalue over the whole vector, what equals it kept (arXiv 2306.01708)."""
    flat = flat.clone()
    for row, share in zip(flat, density):
        cut = row.numel() - int(row.numel() * share)
        if cut:
            row[row.abs() < row.abs().kthvalue(cut).values] = 0
    return scaling * elected(flat, weight or [1.0] * len(flat), count, majority, normalize)


def tensor_oracle(flat, density, weight, rescale=False, normalize=True):
    """Exactly max(1, int(density n)) entries, the earlier of equals, then an optional L1 rescale."""
    kept = torch.zeros_like(flat)
    for row, out, share in zip(flat, kept, density):
        chosen = row.abs().sort(descending=True, stable=True).indices[: max(1, int(share * row.numel()))]
        out[chosen] = row[chosen]
        if rescale:
            out *= row.abs().sum() / out.abs().sum()
    return elected(kept, weight, False, False, normalize)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"density": 0.55, "scaling": 0.7},
        {"density": 1.0, "weight": [0.5, 2.0, -1.0]},
        {"density": [0.1, 0.4, 1.0], "elect": "count", "normalize": False},
        {"tie": "positive", "normalize": False},
    ],
)
def test_over_the_model(options, rows):
    base, experts = model_family()
    flat = flat_taus(base, experts)
    density = options.get("density", 0.2)
    moved = model_oracle(
        flat,
        density if isinstance(density, list) else [density] * 3,
        options.get("weight"),
        options.get("scaling", 1.0),
        options.get("elect") == "count",
        options.get("tie") != "positive",
        options.get("normalize", True),
    )
    assert error(merge("ties", base, experts, rows, **options), unflat(base, moved), base) < 1e-6


@pytest.mark.parametrize("parameters", [{}, {"rescale": "l1"}, {"normalize": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_tensors_keeps_exactly_so_many(parameters, dtype):
    base, experts = model_family(dtype=dtype)  # in bfloat16 many magnitudes are equal
    density, weight = [0.3, 0.5, 1.0], [0.7, 1.3, 1.0]
    given = dict(density=density, weight=weight, threshold="tensor", tie="positive", **parameters)
    merged = merge("ties", base, experts, 4, **given)
    for name, tensor in base.items():
        flat = taus(tensor, [e[name] for e in experts]).flatten(1)
        moved = tensor_oracle(flat, density, weight, "rescale" in parameters, "normalize" not in parameters)
        assert error(merged[name], tensor.double() + moved.view(tensor.shape), tensor.double()) < 1e-6


def test_a_majority_decides_where_signs_cancel():
    base = torch.zeros(6)
    experts = [torch.tensor([-1.0, 2.0, -3.0, -4.0, -5.0, 0.0]), torch.tensor([1.0, -2.0, -1.0, -1.0, 3.0, 0.0])]
    merged = get_anchor("ties")(base, experts, density=1.0)
    assert merged.tolist() == [-1.0, -2.0, -2.0, -2.5, -5.0, 0.0]  # most sums are negative: ties are too
    assert get_anchor("ties")(base, experts, density=1.0, tie="positive").tolist()[:2] == [1.0, 2.0]
    even = [torch.tensor([1.0, 1.0, -2.0]), torch.tensor([-1.0, 1.0, -1.0])]  # as many plus as minus: minus
    assert get_anchor("ties")(torch.zeros(3), even, density=1.0).tolist()[0] == -1.0


def test_reads_the_model_as_often_as_it_must():
    base, experts = model_family()
    for given, passes in [
        ({}, 3),
        ({"tie": "positive"}, 2),
        ({"threshold": "tensor"}, 1),
        ({"threshold": "tensor", "tie": "positive"}, 0),
    ]:
        model = Tensors(get_anchor("ties"), base, experts, given)
        model.rule.reduce(model)
        assert model.passes == passes


def test_a_share_of_nothing_leaves_the_expert_out():
    base, experts = family()
    for threshold in ("model", "tensor"):
        rule = get_anchor("ties")
        merged = rule(base, experts, density=[0.5, 0.0, 0.5], threshold=threshold, tie="positive")
        without = rule(base, [experts[0], experts[2]], density=0.5, threshold=threshold, tie="positive")
        assert torch.equal(merged, without)


def test_one_density_for_the_whole_model():
    base, experts = model_family()
    varied = [{"filter": "head", "value": 0.5}, {"value": 0.2}]
    with pytest.raises(ConfigError, match=r"density is .* for 'embed\.weight'"):
        merge("ties", base, experts, density=varied)
    merge("ties", base, experts, density=varied, threshold="tensor")


@pytest.mark.parametrize("rank", [0, 1, 2, 17, 50, 99, 100])
def test_order_statistics_are_exact_over_parts(rank):
    values = torch.randn(100) * torch.logspace(-30, 30, 100)
    values[10:20] = values[30]
    minus = torch.randn(100)
    for other in (torch.zeros(100), minus):
        parts = [list(zip([v], [m])) for v, m in zip(values.split(7), other.split(7))]
        ordered = (values - other).abs().sort().values
        expected = 0.0 if rank == 0 else float(ordered[rank - 1])
        assert kth_smallest_magnitudes(lambda count: [count(parts)], [lambda n: rank]) == (expected,)  # noqa: B023
        found = order_statistics(lambda count: [count(parts)], [[lambda n: rank, lambda n: n]])[0]  # noqa: B023
        assert [s.value for s in found] == [expected, float(ordered[-1])]
        if rank:
            assert found[0].equals == int((ordered == expected).sum())
            assert found[0].place == rank - int((ordered < expected).sum())


@pytest.mark.parametrize(("smallest", "largest"), [(0, 0), (5, 0), (0, 3), (5, 3), (7, 4), (11, 0), (0, 11), (6, 5)])
def test_bounds_and_indices_leave_exactly_so_many_of_equals(smallest, largest):
    base = torch.tensor([1.0, 2.0, 3.0, 0.0] * 3, dtype=torch.bfloat16)
    delta = torch.tensor([1.0, -1.0, 2.0, 1.0, 1.0, -2.0, 2.0, 1.0, 2.0, 4.0, -1.0, 1.0], dtype=torch.bfloat16)
    expert = base + delta
    lower, upper, dropped = exact_bounds(base, expert, smallest, largest)
    magnitude = delta.float().abs()
    kept = (magnitude >= lower) & (magnitude <= upper)
    if dropped is not None:
        assert dropped.tolist() == sorted(dropped.tolist())
        kept[dropped] = False
    order = delta.float().abs().sort(descending=True, stable=True).indices
    expected = torch.zeros(12, dtype=torch.bool)
    expected[order[largest : 12 - smallest]] = True
    if smallest + largest < 12:  # else nothing is left, and the bounds need not say so
        assert torch.equal(kept, expected)


def test_a_nan_is_for_the_blend_to_refuse():
    assert kth_smallest_magnitudes(lambda count: [count([[torch.tensor([1.0, math.nan])]])], [lambda n: 2]) == (
        math.inf,
    )
    assert just_above(1e-5) > float(torch.tensor(1e-5)) > 0

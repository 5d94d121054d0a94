"""Each rule against a float64 oracle written from its paper's formula, and the laws they share."""

from __future__ import annotations

import math

import pytest
import torch

from bmm_engine.anchors import anchor, get_anchor, registered_anchors
from bmm_engine.anchors.contract import _registry
from bmm_engine.anchors.iso_c import polar_factor
from bmm_engine.anchors.select import kth_smallest_magnitudes
from bmm_engine.errors import ConfigError
from tests.numerics import relative_error


def family(tasks=3, shape=(6, 9), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=dtype)
    return base, [base + 0.1 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(tasks)]


def run(name, base, experts, **parameters):
    """A rule on a model of one tensor."""
    rule = get_anchor(name)
    checked = rule.parameters(parameters)
    if rule.reduce is not None:
        checked["state"] = rule.reduce(lambda: [("w", base, experts)], **checked)
    return rule.rule(base, experts, **checked)


def taus(base, experts):
    return [e.double() - base.double() for e in experts]


def ties_oracle(base, experts, density, scaling):
    """TIES on the flat vector (arXiv 2306.01708): trim by kthvalue, elect, disjoint mean."""
    flat = torch.stack([t.reshape(-1) for t in taus(base, experts)])
    k = flat.shape[1] - int(flat.shape[1] * density)
    if k > 0:
        flat = flat * (flat.abs() >= flat.abs().kthvalue(k, dim=1, keepdim=True).values)
    sign = flat.sum(0).sign()
    sign[sign == 0] = 1.0 if sign.sum() > 0 else -1.0
    agreeing = flat * (flat.sign() == sign)
    merged = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    return base.double() + scaling * merged.reshape(base.shape)


def iso_oracle(base, experts, scaling):
    u, s, vh = torch.linalg.svd(sum(taus(base, experts)), full_matrices=False)
    return base.double() + scaling * s.mean() * (u @ vh)


ORACLES = {
    "average": [
        ({}, lambda b, e: sum(x.double() for x in e) / len(e)),
        ({"weights": [1.0, 2.0, 5.0]}, lambda b, e: (e[0].double() + 2 * e[1].double() + 5 * e[2].double()) / 8),
    ],
    "task_arithmetic": [
        ({}, lambda b, e: b.double() + 0.3 * sum(taus(b, e))),
        ({"scaling": 1.0}, lambda b, e: b.double() + sum(taus(b, e))),
    ],
    "ties": [
        ({}, lambda b, e: ties_oracle(b, e, 0.2, 1.0)),
        ({"density": 0.55, "scaling": 0.7}, lambda b, e: ties_oracle(b, e, 0.55, 0.7)),
        ({"density": 1.0}, lambda b, e: ties_oracle(b, e, 1.0, 1.0)),
    ],
    "iso_c": [({}, lambda b, e: iso_oracle(b, e, 1.0)), ({"scaling": 1.4}, lambda b, e: iso_oracle(b, e, 1.4))],
}
CASES = [(name, parameters, oracle) for name, cases in ORACLES.items() for parameters, oracle in cases]


def test_every_rule_has_an_oracle():
    assert set(registered_anchors()) == set(ORACLES)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 7)])
@pytest.mark.parametrize(("name", "parameters", "oracle"), CASES)
def test_matches_its_formula(name, parameters, oracle, shape):
    base, experts = family(shape=shape)
    truth = oracle(base, experts)
    assert relative_error(run(name, base, experts, **parameters), truth) < 1e-6


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_inputs_are_not_written_and_equal_experts_agree(name):
    base, experts = family()
    copies = [base.clone(), *(e.clone() for e in experts)]
    run(name, base, experts)
    assert all(torch.equal(a, b) for a, b in zip(copies, [base, *experts]))
    assert torch.equal(run(name, base, [base, base]), base)
    expected = {
        "average": experts[0],
        "ties": None,
        "task_arithmetic": base + 0.6 * (experts[0] - base),
        "iso_c": None,
    }[name]
    if expected is not None:
        torch.testing.assert_close(run(name, base, [experts[0]] * 2), expected, rtol=1e-6, atol=1e-6)


def test_ties_of_one_task_keeps_its_largest_entries():
    base, experts = family(tasks=1, shape=(10, 10))
    merged = run("ties", base, experts, density=0.2)
    changed = merged != base
    assert int(changed.sum()) == 21  # the threshold itself is kept too, as its authors' code does
    tau = (experts[0] - base).abs()
    assert tau[changed].min() > tau[~changed].max()


@pytest.mark.parametrize("rank", [0, 1, 2, 17, 50, 99, 100])
def test_kth_smallest_is_exact_over_chunks(rank):
    values = torch.randn(100) * torch.logspace(-30, 30, 100)
    values[10:20] = values[30]  # ties
    found = kth_smallest_magnitudes(lambda: ([c] for c in values.split(7)), lambda n: rank)
    expected = 0.0 if rank == 0 else float(values.abs().sort().values[rank - 1])
    assert found == (expected,)


def test_polar_of_rank_deficient_and_zero_matrices():
    matrix = torch.randn(8, 2) @ torch.randn(2, 5)
    polar, mean = polar_factor(matrix)
    assert mean == pytest.approx(float(torch.linalg.svdvals(matrix.double()).mean()), rel=1e-6)
    torch.testing.assert_close(polar.T @ polar, torch.eye(5), rtol=1e-5, atol=1e-5)
    assert float((polar * matrix).sum()) / 5 == pytest.approx(mean, rel=1e-5)
    zero, mean = polar_factor(torch.zeros(3, 4))
    assert mean == 0
    assert not zero.any()


@pytest.mark.parametrize("ratio", [1e-2, 1e-4, 1e-6, 1e-9])
def test_polar_is_accurate_whatever_the_condition(ratio):
    u = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(20, 12, dtype=torch.float64))[0]
    s = torch.logspace(0, math.log10(ratio), 12, dtype=torch.float64)
    polar, mean = polar_factor((u * s) @ v.T)
    torch.testing.assert_close(polar, u @ v.T, rtol=0, atol=1e-5)
    assert mean == pytest.approx(float(s.mean()), rel=1e-9)


def test_unknown_names_and_parameters():
    with pytest.raises(ConfigError, match="did you mean 'task_arithmetic'"):
        get_anchor("task_arithmetics")
    with pytest.raises(ConfigError, match="did you mean 'scaling'"):
        get_anchor("task_arithmetic").parameters({"scalling": 0.3})
    with pytest.raises(ConfigError, match=r"density = 1\.5"):
        get_anchor("ties").parameters({"density": 1.5})
    with pytest.raises(ConfigError, match="2 weights"):
        run("average", *family(), weights=[1.0, 2.0])


def test_a_rule_registers_itself_and_is_checked():
    try:

        @anchor(scope="tensor", elementwise=True, paper="none")
        def first(base, experts, *, share: float = 0.5):
            """The first expert's share."""
            return base + share * (experts[0] - base)

        rule = get_anchor("first")
        assert rule.summary == "The first expert's share."
        assert rule.parameters() == {"share": 0.5}
    finally:
        _registry.pop("first", None)
    with pytest.raises(ConfigError, match=r"a rule has a `reduce`"):
        anchor(scope="model", paper="none")(lambda base, experts: base)

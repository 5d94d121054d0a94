"""Rules that merge small cores in shared bases, DC-Merge and Core Space, against float64 oracles that take plain SVDs of everything."""

from __future__ import annotations

import math

import pytest
import torch

from bmm_engine import merge
from bmm_engine.anchors import get_anchor, registered_anchors
from bmm_engine.errors import ConfigError
from bmm_engine.ops.lowrank import LowRank
from tests.anchors.test_subspace import family, polar, svd, taus, ties
from tests.numerics import relative_error

SHAPES = [(3, 12, 20), (4, 24, 12), (5, 16, 16), (1, 6, 7), (3, 1, 9)]


def moved(name, base, experts, **options):
    """The merged task vector, in float64."""
    base, experts = base.double(), [e.double() for e in experts]
    return get_anchor(name)(base, experts, **options) - base


def dc_oracle(base, experts, *, density=0.001, combine="ties", rank=None, smoothing="none", ratio=5.0):
    tasks = len(experts)
    own = min(base.shape) // tasks if rank is None else min(rank, min(base.shape) // tasks)
    if not own:
        return torch.zeros_like(base, dtype=torch.float64)
    parts = []
    for tau in taus(base, experts):
        u, s, vh = (part[:own] if i else part[:, :own] for i, part in enumerate(svd(tau)))
        if smoothing == "average":
            s = torch.full_like(s, float(s.mean()))
        if smoothing == "linear":
            first = min(ratio, float(s[0] / s[-1]))
            line = torch.tensor([first + (1 - first) * j / max(own - 1, 1) for j in range(own)], dtype=torch.float64)
            s = line * s.sum() / line.sum()
        parts.append((u, s, vh))
    left, right = polar(torch.cat([p[0] for p in parts], 1)), polar(torch.cat([p[2] for p in parts], 0))
    cores = [left.T @ u @ torch.diag(s) @ vh @ right.T for u, s, vh in parts]
    if combine == "sum":
        core = sum(cores)
    else:
        kept = max(1, int(density * cores[0].numel()))
        cores = [torch.where(c.abs() >= c.abs().flatten().topk(kept).values.min(), c, 0.0) for c in cores]
        core = torch.zeros_like(cores[0])
        for row in range(len(core)):
            for column in range(len(core)):
                entries = [float(c[row, column]) for c in cores]
                sign = math.copysign(1.0, sum(entries)) if sum(entries) else 0.0
                agreeing = [e for e in entries if e * sign > 0]
                core[row, column] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    blocks = torch.arange(len(core)) // own
    return left @ (core * (blocks[:, None] == blocks)) @ right


@pytest.mark.parametrize(("tasks", "out", "width"), SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"density": 0.3},
        {"combine": "sum"},
        {"rank": 2, "smoothing": "average", "density": 0.5},
        {"smoothing": "linear", "ratio": 1.7, "combine": "sum"},
        {"smoothing": "linear", "ratio": 1e6, "density": 1.0},
    ],
    ids=str,
)
def test_dc_merge_matches_its_formula(tasks, out, width, options):
    base, experts = family(tasks, out, width)
    truth = dc_oracle(base, experts, **options)
    found = moved("dc_merge", base, experts, scaling=-1.5, **options)
    assert float((found + 1.5 * truth).norm()) <= 1e-9 * float(truth.norm())


def apart(tasks, out, width, rank):
    """A base and task vectors in spaces at right angles, of that rank."""
    base, (noise,) = family(1, out, width, dtype=torch.float64, size=1.0)
    u, _, vh = svd(noise)
    parts = [slice(t * rank, (t + 1) * rank) for t in range(tasks)]
    strengths = torch.linspace(1.0, 0.2, rank, dtype=torch.float64)
    return base, [base + (u[:, p] * strengths * (t + 1)) @ vh[p] for t, p in enumerate(parts)]


def test_dc_merge_of_tasks_at_right_angles_is_their_sum_and_tsv_m():
    base, experts = apart(3, 12, 20, 4)
    truth = sum(taus(base, experts))
    assert relative_error(moved("dc_merge", base, experts, combine="sum"), truth) < 1e-9
    # As many entries as each task has directions: what others have there is rounding, which would count as a vote.
    assert relative_error(moved("dc_merge", base, experts, density=4.5 / 144), truth) < 1e-9
    assert relative_error(moved("tsv_m", base, experts), truth) < 1e-9


def test_dc_merge_smooths_the_strengths_and_keeps_their_sum():
    base, experts = apart(3, 12, 20, 4)
    _, even, _ = svd(moved("dc_merge", base, experts, combine="sum", smoothing="average"))
    assert torch.allclose(even, torch.tensor([1.8] * 4 + [1.2] * 4 + [0.6] * 4, dtype=torch.float64), rtol=1e-9)
    _, line, _ = svd(moved("dc_merge", base, experts, combine="sum", smoothing="linear", ratio=3.0))
    assert float(line.sum()) == pytest.approx(4 * (1.8 + 1.2 + 0.6))
    assert float(line[0]) == pytest.approx(3 * 0.9)  # 2.7 down to 0.9


# Core Space


def adapters(ranks=(2, 2, 2), out=12, width=20, seed=0):
    """A base, experts that are adapters of it, and their products; all float64."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(out, width, generator=generator, dtype=torch.float64)
    products = [
        LowRank(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((out, r), (r, width))))
        for r in ranks
    ]
    return base, [base + p.dense() for p in products], products


def core_oracle(base, products, combine):
    """Panariello et al. 2025: bases by SVDs of the stacked factors."""
    left = svd(torch.cat([p.left for p in products], 1))[0]
    right = svd(torch.cat([p.right for p in products], 0))[2]
    return left @ combine([left.T @ p.dense() @ right.T for p in products]) @ right


def flat_ties(share):
    return lambda cores: ties([c.reshape(-1) for c in cores], share).reshape(cores[0].shape)


def flat_tsv(cores):
    own = min(cores[0].shape) // len(cores)
    parts = [(u[:, :own], s[:own], vh[:own]) for u, s, vh in map(svd, cores)]
    left, right = polar(torch.cat([p[0] for p in parts], 1)), polar(torch.cat([p[2] for p in parts], 0))
    return left @ torch.diag(torch.cat([p[1] for p in parts])) @ right


@pytest.mark.parametrize("ranks", [(2, 2, 2), (4, 3, 3), (9, 9, 9), (2,)], ids=str)
def test_core_space_matches_its_formula(ranks):
    base, experts, products = adapters(ranks)
    for options, combine in [
        ({"rule": "ties", "rule_parameters": {"density": 0.4}}, flat_ties(0.4)),
        ({"rule": "tsv_m"}, flat_tsv),
        ({"rule": "task_arithmetic", "rule_parameters": {"scaling": 0.3}}, lambda cores: 0.3 * sum(cores)),
    ]:
        found = moved("core_space", base, experts, low_rank=products, scaling=0.7, **options)
        assert relative_error(found, 0.7 * core_oracle(base, products, combine)) < 1e-9


def test_a_linear_rule_in_the_core_is_the_rule_outside():
    """Without loss: of adapters, of full matrices, of both, of more adapters than the module has rows."""
    base, experts, products = adapters((2, 3, 2))
    full = family(3, 12, 20, dtype=torch.float64)[1]
    many = adapters((3,) * 7)
    cases = [
        (base, experts, products),
        (base, full, ()),
        (base, [full[0], *experts[1:]], [None, *products[1:]]),
        many,
    ]
    for start, own, low_rank in cases:
        for rule, options in [("average", {}), ("task_arithmetic", {"scaling": 0.4})]:
            found = moved("core_space", start, own, low_rank=low_rank, rule=rule, rule_parameters=options)
            assert relative_error(found, moved(rule, start, own, **options)) < 1e-9


def test_tsv_m_in_the_core_is_tsv_m_outside():
    """Where neither cuts off what the adapters have; full matrices only change their basis, so there it is always so."""
    base, experts, products = adapters((2, 2, 2))
    outside = moved("tsv_m", base, experts, low_rank=products)
    assert relative_error(moved("core_space", base, experts, low_rank=products), outside) < 1e-9
    base, experts = family(3, 12, 20, dtype=torch.float64)
    assert relative_error(moved("core_space", base, experts), moved("tsv_m", base, experts)) < 1e-9


def test_weights_in_the_core_are_of_the_task_vectors():
    base, experts, products = adapters((2, 3))
    found = moved("core_space", base, experts, low_rank=products, rule="task_arithmetic", weight=[2.0, -0.5])
    first, second = taus(base, experts)
    scale = get_anchor("task_arithmetic").defaults["scaling"]
    assert relative_error(found, scale * (2 * first - 0.5 * second)) < 1e-9


FITTING = [n for n, rule in registered_anchors().items() if rule.symmetric and not rule.needs and n != "core_space"]


@pytest.mark.parametrize("rule", FITTING)
def test_every_fitting_rule_works_in_the_core(rule):
    base, experts, products = adapters((2, 2, 2) if get_anchor(rule).experts[1] is None else (2, 2))
    least, most = get_anchor(rule).experts
    count = min(most or 3, max(least, 3))
    merged = moved("core_space", base, experts[:count], low_rank=products[:count], rule=rule)
    assert merged.isfinite().all()
    q = torch.linalg.qr(torch.cat([p.left for p in products], 1)).Q
    assert float((merged - q @ (q.T @ merged)).norm()) <= 1e-9 * (1 + float(merged.norm()))


def test_core_space_says_which_rules_and_values_do_not_fit():
    base, experts, products = adapters()
    for options, words in [
        ({"rule": "tie"}, "did you mean 'ties'"),
        ({"rule": "slerp"}, "'slerp'.*order of the experts"),
        ({"rule": "regmean"}, "'regmean'.*measured on data"),
        ({"rule": "core_space"}, "bases of its own"),
        ({"rule": "ties", "rule_parameters": {"densty": 0.3}}, "did you mean 'density'"),
        ({"rule": "ties", "rule_parameters": {"weight": [1.0, 2.0, 3.0]}}, "weight must have one value"),
        ({"rule": "ties", "rule_parameters": {"density": 1.5}}, "density = 1.5"),
        ({"rule_parameters": 3}, "rule_parameters = 3"),
    ]:
        with pytest.raises(ConfigError, match=words):
            get_anchor("core_space")(base, experts, low_rank=products, **options)


def test_parameters_of_the_inner_rule_come_by_keyword_and_vary_by_filter():
    generator = torch.Generator().manual_seed(0)
    base = {f"{n}.weight": torch.randn(6, 5, generator=generator, dtype=torch.float64) for n in ("a", "b")}
    experts = [
        {n: w + torch.randn(6, 5, generator=generator, dtype=torch.float64) for n, w in base.items()} for _ in range(2)
    ]
    parameters = {
        "rule": "task_arithmetic",
        "rule_parameters": [{"filter": "a", "value": {"scaling": 0.25}}, {"value": {"scaling": 2.0}}],
    }
    merged = merge(
        base, experts, anchor="core_space", anchor_parameters=parameters, modules=["a", "b"], alpha=math.inf
    ).tensors
    for name, scaling in [("a.weight", 0.25), ("b.weight", 2.0)]:
        total = sum(e[name] - base[name] for e in experts)
        assert relative_error(merged[name] - base[name], scaling * total) < 1e-9

"""The rules that work entry by entry, against oracles in float64 written from their formulas, and their laws."""

from __future__ import annotations

import math

import pytest
import torch

from bmm_engine.anchors import Site, get_anchor
from bmm_engine.errors import ConfigError, NonFiniteWeightError
from tests.anchors.models import error, family, flat_taus, merge, model_family, taus, unflat

RULES = [
    "average",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "sce",
    "ram",
    "ram_plus",
    "magmax",
    "pcb",
    "consensus_ta",
    "localize_and_stitch",
]
# Options with which each rule works tensor by tensor, as mergekit does.
LOCAL = {
    "ties": {"threshold": "tensor", "tie": "positive", "rescale": "l1"},
    "dare_linear": {"rescale": "l1"},
    "dare_ties": {"trim": 1.0, "rescale": "l1", "tie": "positive"},
    "breadcrumbs": {"extent": "row"},
    "breadcrumbs_ties": {"rescale": "l1"},
    "della": {"rescale": "l1"},
    "della_linear": {"rescale": "none"},
    "sce": {"select_topk": 0.3},
    "ram_plus": {"extent": "tensor"},
    "pcb": {"clip": 0.01, "ratio": 0.05, "inter": "normalized"},
    "localize_and_stitch": {"density": 1.0},
}
CASES = [(name, given) for name in RULES for given in ({}, LOCAL.get(name)) if given is not None]


def check(name, oracle, tolerance=1e-6, **given):
    """`oracle(flat task vectors (T, n)) -> what is added to the base`, on tensors of several shapes."""
    for shape in [(12, 17), (33,), (1, 9), (5, 4, 3)]:
        base, experts = family(shape=shape)
        moved = oracle(taus(base, experts).flatten(1)).view(shape)
        got = get_anchor(name)(base, experts, **given)
        assert got.dtype == torch.float32
        assert error(got, base.double() + moved, base) < tolerance, shape


def elect(v, weight=None, normalize=True):
    """Entries that agree with the sign of the sum (0: plus), over the weights of those that do."""
    w = torch.tensor(weight or [1.0] * len(v), dtype=torch.float64)[:, None]
    sign = torch.where(v.sum(0) >= 0, 1.0, -1.0).double()
    agrees = v.sign() == sign
    divisor = (w * agrees).sum(0)
    return (v * agrees).sum(0) / (torch.where(divisor == 0, 1.0, divisor) if normalize else 1)


def weighted(weight, vectors):
    return torch.tensor(weight, dtype=torch.float64)[:, None] * vectors


# Linear rules


def test_average():
    base, experts = family()
    stacked = torch.stack([e.double() for e in experts])
    w = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)[:, None, None]
    assert error(get_anchor("average")(base, experts), stacked.mean(0), 0 * base) < 1e-7
    got = get_anchor("average")(base, experts, weights=[1.0, 2.0, 5.0])
    assert error(got, (w * stacked).sum(0) / 8, 0 * base) < 1e-7
    got = get_anchor("average")(base, experts, weights=[1.0, 2.0, 5.0], normalize=False)
    assert error(got, (w * stacked).sum(0), 0 * base) < 1e-7
    assert torch.equal(get_anchor("average")(base, [experts[0]] * 5), experts[0])
    with pytest.raises(ConfigError, match="sum to 0"):
        get_anchor("average")(base, experts, weights=[1.0, 1.0, -2.0])


def test_task_arithmetic():
    weight = [0.5, -1.0, 2.0]
    check("task_arithmetic", lambda tau: 0.3 * tau.sum(0))
    check("task_arithmetic", lambda tau: 0.7 * weighted(weight, tau).sum(0), scaling=0.7, weight=weight)
    check("task_arithmetic", lambda tau: weighted(weight, tau).sum(0) / 1.5, scaling=1, weight=weight, normalize=True)


# Thinned at random


def uniform(seed, index):
    """The upper 24 bits of SplitMix64."""
    mask = 2**64 - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return ((z ^ z >> 31) >> 40) / 2**24


def chance(name, shape, tasks=3, seed=0):
    """(T, n) numbers in [0, 1), as a tensor of that name gets them."""
    site = Site(name, torch.empty(0), [], {}, shape)
    n = math.prod(shape)
    return torch.tensor([[uniform(site.seed(seed, t), i) for i in range(n)] for t in range(tasks)], dtype=torch.float64)


def l1(thinned, tau):
    after = thinned.abs().sum(1, keepdim=True)
    return thinned * torch.where(after > 0, tau.abs().sum(1, keepdim=True) / after, 1.0)


def thin(tau, p, rescale, seed=0, shape=None, name="tensor"):
    kept = tau * (chance(name, shape or tau.shape[1:], len(tau), seed) < p)
    return {"inverse": kept / p, "none": kept, "l1": l1(kept, tau)}[rescale]


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_dare(rescale):
    weight, p = [0.5, -1.0, 2.0], torch.tensor([[0.25], [0.5], [1.0]], dtype=torch.float64)
    given = dict(density=[0.25, 0.5, 1.0], rescale=rescale, weight=weight, scaling=0.7, seed=3)
    check("dare_linear", lambda tau: 0.7 * weighted(weight, thin(tau, p, rescale, 3)).sum(0), **given)
    check(
        "dare_ties",
        lambda tau: 0.7 * elect(weighted(weight, thin(tau, p, rescale, 3)), weight),
        **given,
        trim=1.0,
        tie="positive",
    )


@pytest.mark.parametrize("rows", [None, 4])
def test_dare_ties_trims_over_the_model(rows):
    base, experts = model_family()
    thinned = [
        thin(taus(t, [e[k] for e in experts]).flatten(1), 0.5, "inverse", name=k, shape=t.shape)
        for k, t in base.items()
    ]
    flat = torch.cat(thinned, 1)
    for row in flat:
        row[row.abs() < row.abs().kthvalue(row.numel() - int(0.2 * row.numel())).values] = 0
    sign = flat.sum(0).sign()
    sign[sign == 0] = 1.0 if sign.sum() > 0 else -1.0
    agrees = flat.sign() == sign
    moved = (flat * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    assert error(merge("dare_ties", base, experts, rows), unflat(base, moved), base) < 1e-6


def test_dare_keeps_its_share_and_the_mean():
    base, tau = torch.zeros(300, 300), torch.full((300, 300), 0.25)
    rule = get_anchor("dare_linear")
    merged = rule(base, [tau, tau], density=[0.3, 0.0])
    kept = merged != 0
    assert torch.equal(merged[kept], torch.full_like(merged[kept], 0.25 / 0.3))
    share, deviation = float(kept.double().mean()), math.sqrt(0.3 * 0.7 / 90_000)
    assert abs(share - 0.3) < 4 * deviation
    other = rule(base, [tau, tau], density=[0.0, 0.3]) != 0
    assert abs(float((kept & other).double().mean()) - 0.09) < 4 * math.sqrt(0.09 * 0.91 / 90_000)
    assert not torch.equal(kept, rule(base, [tau], density=0.3, seed=1) != 0)
    assert not torch.equal(kept, rule(base, [tau], density=0.3, name="another") != 0)


def rank_probabilities(tau, density, epsilon):
    """p of a matrix's or a vector's entries by their rank in the row."""
    rows = tau.flatten(1) if tau.dim() > 1 else tau[None]
    n = rows.shape[1]
    ranks = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).double()
    r = ranks / (n - 1) if n > 1 else torch.ones_like(ranks)
    return (density - epsilon + 2 * epsilon * r).view(tau.shape)


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
@pytest.mark.parametrize("shape", [(12, 17), (33,), (6, 4, 3), (5, 1)])
def test_della(shape, rescale):
    base, experts = family(shape=shape)
    tau, density, epsilon = taus(base, experts), [0.3, 0.5, 0.6], [0.1, 0.0, 0.35]
    p = torch.stack([rank_probabilities(*args) for args in zip(tau, density, epsilon)]).flatten(1)
    weight = [0.5, -1.0, 2.0]
    v = weighted(weight, thin(tau.flatten(1), p, rescale, 3))
    given = dict(density=density, epsilon=epsilon, weight=weight, rescale=rescale, scaling=0.7, seed=3)
    for name, moved in [("della_linear", v.sum(0)), ("della", elect(v, weight))]:
        truth = base.double() + 0.7 * moved.view(shape)
        assert error(get_anchor(name)(base, experts, **given), truth, base) < 1e-6


def test_della_refuses_probabilities_outside_0_and_1():
    base, experts = family()
    for name in ("della", "della_linear"):
        with pytest.raises(ConfigError, match=r"'tensor', expert 1: density 0\.1 and epsilon 0\.15 .* below 0\.1"):
            get_anchor(name)(base, experts, density=[0.5, 0.1, 1.0])
    whole = get_anchor("della_linear")(base, experts, density=[1.0, 0.0, 1.0])
    assert torch.equal(whole, get_anchor("task_arithmetic")(base, [experts[0], experts[2]], scaling=1.0))


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_chance_does_not_depend_on_how_a_tensor_is_cut(name):
    base, experts = model_family()
    whole, cut = merge(name, base, experts), merge(name, base, experts, rows=2)
    assert all(torch.equal(whole[k], cut[k]) for k in base)


# Selected by magnitude


def crumbs(tau, density, gamma):
    out = torch.zeros_like(tau)
    for row, kept in zip(tau, out):
        n, target = row.numel(), int(density * row.numel())
        first = min(int(gamma * n), n - target)
        chosen = row.abs().sort(descending=True, stable=True).indices[first : first + target]
        kept[chosen] = row[chosen]
    return out


@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.006), (0.5, 0.1), (0.95, 0.2), (0.3, 0.0), (0.02, 0.5)])
def test_breadcrumbs(density, gamma):
    weight, given = [0.5, -1.0, 2.0], dict(density=density, gamma=gamma)
    check("breadcrumbs", lambda tau: 0.2 * crumbs(tau, density, gamma).sum(0), **given)
    check(
        "breadcrumbs_ties",
        lambda tau: elect(weighted(weight, l1(crumbs(tau, density, gamma), tau)), weight),
        **given,
        weight=weight,
        rescale="l1",
    )


def test_breadcrumbs_of_rows():
    base, experts = family(shape=(6, 40))
    moved = sum(crumbs(tau, 0.3, 0.05) for tau in taus(base, experts))
    got = get_anchor("breadcrumbs")(base, experts, density=0.3, gamma=0.05, extent="row", scaling=1.0)
    assert error(got, base.double() + moved, base) < 1e-6


@pytest.mark.parametrize("share", [1.0, 0.5, 0.03, 0.0])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_sce(share, epsilon):
    def oracle(tau):
        variance = tau.var(0, unbiased=False)
        selected = torch.ones_like(variance)
        if share < 1:
            selected = torch.zeros_like(variance)
            selected[variance.topk(int(int(variance.count_nonzero()) * share)).indices] = 1
        tau = tau * selected
        energy = tau.square().mean(1, keepdim=True)
        total = energy.sum()
        w = energy / total if total >= max(epsilon, 1e-300) else torch.full_like(energy, 1 / len(tau))
        agrees = w * (tau.sign() == torch.where(tau.sum(0) >= 0, 1.0, -1.0))
        return (agrees * tau).sum(0) / agrees.sum(0).clamp(min=max(epsilon, 1e-300))

    check("sce", oracle, select_topk=share, epsilon=epsilon)


def test_sce_weighs_by_energy_at_any_scale():
    base, (large, small) = torch.zeros(8), (torch.full((8,), 3e-6), torch.full((8,), 1e-6))
    got = get_anchor("sce")(base, [large, small])
    torch.testing.assert_close(got, torch.full((8,), 2.8e-6), rtol=1e-5, atol=0)  # (9 x 3 + 1 x 1) / 10
    got = get_anchor("sce")(base, [large, small], epsilon=1e-6)
    torch.testing.assert_close(got, torch.full((8,), 2e-6), rtol=1e-5, atol=0)


def ram_oracle(tau, epsilon, unique):
    changed = tau.abs() > epsilon
    n = changed.sum(0)
    kept = tau * changed
    return torch.where(n == 1, (kept * torch.tensor(unique).double()[:, None]).sum(0), kept.sum(0) / n.clamp(min=1))


def rho(tau, epsilon):
    changed = tau.abs() > epsilon
    n = changed.sum(0)
    return [float((c & (n > 1)).sum() / (c & (n == 1)).sum()) for c in changed]


def test_ram():
    epsilon = 2.0**-4  # on the grid, so that some entries may equal it: they do not count
    check("ram", lambda tau: ram_oracle(tau, epsilon, [1.0] * 3), epsilon=epsilon)
    base = torch.zeros(4)
    experts = [torch.tensor([epsilon, 1.0, 1.0, 0.0]), torch.tensor([-epsilon, 3.0, 0.0, 0.0])]
    assert get_anchor("ram")(base, experts, epsilon=epsilon).tolist() == [0.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize("rows", [None, 4])
def test_ram_plus(rows):
    base, experts = model_family()
    flat = flat_taus(base, experts)
    unique = [1 + 0.3 * min(x, 2.5) for x in rho(flat, 0.25)]
    assert len({round(u, 9) for u in unique}) == 3
    given = dict(epsilon=0.25, r=0.3, alpha=2.5)
    truth = unflat(base, ram_oracle(flat, 0.25, unique))
    assert error(merge("ram_plus", base, experts, rows, **given), truth, base) < 1e-6
    truth = {}
    for name, tensor in base.items():
        tau = taus(tensor, [e[name] for e in experts]).flatten(1)
        own = [1 + 0.3 * min(x, 2.5) if not math.isnan(x) else 1.0 for x in rho(tau, 0.25)]
        truth[name] = tensor.double() + ram_oracle(tau, 0.25, own).view(tensor.shape)
    assert error(merge("ram_plus", base, experts, rows, **given, extent="tensor"), truth, base) < 1e-6


def test_magmax():
    check("magmax", lambda tau: 0.5 * tau.gather(0, tau.abs().argmax(0)[None])[0])
    base = torch.zeros(2)
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 1.0])
    assert get_anchor("magmax")(base, [first, second], scaling=1.0).tolist() == [-1.0, 2.0]
    assert get_anchor("magmax")(base, [second, first], scaling=1.0).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("votes", [1, 2, 3, 4])
def test_consensus(votes):
    dominance = [0.2, 0.4, 0.6]

    def oracle(tau):
        total = tau.sum(0)
        masks = tau.abs() > torch.tensor(dominance).double()[:, None] * (total - tau).abs()
        return 0.3 * total * (masks.sum(0) >= votes)

    check("consensus_ta", oracle, dominance=dominance, votes=votes)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("layers_only", [False, True])
def test_localize_and_stitch(rows, layers_only):
    base, experts = model_family()
    inside = [k for k in base if not layers_only or "layers." in k]
    chosen = {k: base[k] for k in inside}
    flat = flat_taus(chosen, experts)
    for row, share in zip(flat, [0.1, 0.3, 0.5]):
        row[row.abs() <= row.abs().topk(int(share * row.numel())).values.min()] = 0
    moved = flat.sum(0) / (flat != 0).sum(0).clamp(min=1)
    truth = {k: t.double() for k, t in base.items()} | unflat(chosen, moved)
    got = merge("localize_and_stitch", base, experts, rows, density=[0.1, 0.3, 0.5], layers_only=layers_only)
    assert error(got, truth, base) < 1e-6


# Laws and corners


@pytest.mark.parametrize(("name", "given"), CASES)
def test_parts_give_the_same_bits(name, given):
    base, experts = model_family()
    whole, cut = (merge(name, base, experts, rows, **given) for rows in (None, 3))
    assert all(torch.equal(whole[k], cut[k]) for k in base)


@pytest.mark.parametrize(("name", "given"), CASES)
def test_small_tensors(name, given):
    for shape in [(), (1,), (1, 1), (3,), (2, 3), (1, 40), (40, 1), (0, 4)]:
        for tasks in (1, 3):
            base, experts = family(tasks, shape)
            got = get_anchor(name)(base, experts, **given)
            assert got.shape == base.shape
            assert bool(got.isfinite().all()), shape


@pytest.mark.parametrize(("name", "given"), CASES)
def test_zero_task_vectors_give_the_base(name, given):
    base, experts = family()
    assert torch.equal(get_anchor(name)(base, [base, base.clone()], **given), base)
    if name != "average":  # one task has moved: the others' zeros do no harm
        assert bool(get_anchor(name)(base, [base, experts[0]], **given).isfinite().all())


@pytest.mark.parametrize(("name", "given"), CASES)
def test_inputs_are_not_written(name, given):
    for dtype in (torch.float32, torch.bfloat16):
        base, experts = family(dtype=dtype)
        before = [t.clone() for t in (base, *experts)]
        get_anchor(name)(base, experts, **given)
        assert all(torch.equal(a, b) for a, b in zip(before, (base, *experts)))


@pytest.mark.parametrize(("name", "given"), [case for case in CASES if case[0] not in ("sce", "pcb")])
def test_16_bit_tensors_as_their_float32(name, given):
    """What is stored in 16 bits, in any mix, gives what its exact float32 gives."""
    rule = get_anchor(name)
    assert rule.stored
    base, experts = family(dtype=torch.bfloat16)
    mixed = [experts[0].half().float().bfloat16(), experts[1].half(), experts[2].float()]
    wide = rule(base.float(), [e.float() for e in mixed], **given)
    assert torch.equal(rule(base, mixed, **given), wide)


@pytest.mark.parametrize(("name", "given"), CASES)
def test_extreme_magnitudes(name, given):
    """A rule without a magnitude of its own scales with its tensors."""
    base, experts = family()
    for factor in (2.0**-50, 2.0**50):
        got = get_anchor(name)(base * factor, [e * factor for e in experts], **given)
        assert bool(got.isfinite().all())
        if name not in ("ram", "ram_plus", "pcb"):
            torch.testing.assert_close(got / factor, get_anchor(name)(base, experts, **given), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "given"), [case for case in CASES if case[0] not in ("sce", "pcb")])
@pytest.mark.parametrize("index", [0, 2])
def test_names_what_is_not_finite(name, given, index):
    base, experts = family()
    (base, *experts)[index][3, 4] = math.nan
    if name == "average" and index == 0:  # the base does not count
        assert bool(get_anchor(name)(base, experts).isfinite().all())
        return
    with pytest.raises(NonFiniteWeightError) as caught:
        get_anchor(name)(base, experts, **given)
    assert caught.value.index == index

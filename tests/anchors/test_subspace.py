"""Rules of singular vectors: TSV-M, Iso-C, Iso-CTS, KnOTS, DOGE-TA, against float64 oracles that take plain SVDs of everything."""

from __future__ import annotations

import math

import pytest
import torch

from bmm_engine.anchors import Site, get_anchor
from bmm_engine.anchors.polar import polar_factor, singular_triples
from bmm_engine.errors import ConfigError
from bmm_engine.ops.lowrank import LowRank
from tests.numerics import relative_error

SHAPES = [(3, 12, 20), (4, 24, 12), (5, 16, 16), (2, 40, 9), (1, 6, 7), (3, 1, 9), (2, 1, 1)]


def family(tasks=3, out=12, width=20, seed=0, dtype=torch.float32, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(out, width, generator=generator, dtype=dtype)
    return base, [base + size * torch.randn(out, width, generator=generator, dtype=dtype) for _ in range(tasks)]


def taus(base, experts):
    return [e.double() - base.double() for e in experts]


def svd(matrix):
    return torch.linalg.svd(matrix, full_matrices=False)


def polar(matrix):
    u, _, vh = svd(matrix)
    return u @ vh


def tsv_oracle(base, experts):
    """Gargiulo et al. 2025: zeros stay in the columns that T r does not fill."""
    small = min(base.shape)
    rank = small // len(experts)
    u, s, vh = (
        torch.zeros(len(base), small).double(),
        torch.zeros(small).double(),
        torch.zeros(small, base.shape[1]).double(),
    )
    for t, tau in enumerate(taus(base, experts)):
        own = svd(tau)
        part = slice(t * rank, (t + 1) * rank)
        u[:, part], s[part], vh[part] = own[0][:, :rank], own[1][:rank], own[2][:rank]
    return base.double() + polar(u) @ torch.diag(s) @ polar(vh)


def iso_oracle(base, experts):
    u, s, vh = svd(sum(taus(base, experts)))
    return base.double() + s.mean() * (u @ vh)


def iso_cts_oracle(base, experts, fraction=0.8):
    """Marczak et al. 2025, with the index arithmetic of their code."""
    small, tasks = min(base.shape), len(experts)
    common = small - round((small - int(small * fraction)) / tasks) * tasks
    own = (small - common) // tasks
    u, s, vh = svd(sum(taus(base, experts)))
    parts = [(u[:, :common], s[:common], vh[:common])]
    for tau in taus(base, experts):
        a, b, c = svd(tau - u[:, :common] @ u[:, :common].T @ tau)
        parts.append((a[:, :own], b[:own], c[:own]))
    lefts, values, rights = zip(*parts)
    return base.double() + torch.cat(values).mean() * (polar(torch.cat(lefts, 1)) @ polar(torch.cat(rights, 0)))


@pytest.mark.parametrize(("tasks", "out", "width"), SHAPES)
@pytest.mark.parametrize(
    ("name", "oracle"), [("tsv_m", tsv_oracle), ("iso_c", iso_oracle), ("iso_cts", iso_cts_oracle)]
)
def test_matches_its_formula(name, oracle, tasks, out, width):
    base, experts = family(tasks, out, width)
    truth = oracle(base, experts)
    rule = get_anchor(name)
    merged = rule(base, experts)
    assert merged.dtype == base.dtype
    assert relative_error(merged, truth) < 1e-6
    # The task vector itself, where no rounding of W hides an error
    wide = rule(base.double(), [e.double() for e in experts], scaling=-1.5)
    assert relative_error(wide - base.double(), -1.5 * (truth - base.double())) < 1e-9


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.55, 1.0])
def test_iso_cts_shares_the_directions_as_its_authors_do(fraction):
    base, experts = family(4, 16, 18, dtype=torch.float64)
    assert (
        relative_error(
            get_anchor("iso_cts")(base, experts, common_fraction=fraction), iso_cts_oracle(base, experts, fraction)
        )
        < 1e-9
    )


def test_one_task_is_its_expert_in_tsv_m():
    base, (expert,) = family(1, 9, 14)
    torch.testing.assert_close(get_anchor("tsv_m")(base, [expert]), expert, rtol=0, atol=1e-6)


def test_equal_experts_keep_the_leading_directions_in_tsv_m():
    """What tasks share exactly counts once, and nothing of the null space comes in."""
    base, (expert,) = family(1, 12, 20, dtype=torch.float64)
    u, s, vh = svd(expert - base)
    merged = get_anchor("tsv_m")(base, [expert, expert, expert])
    torch.testing.assert_close(merged, base + (u[:, :4] * s[:4]) @ vh[:4], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    ["tsv_m", "iso_c", "iso_cts", "wudi", "knots", "doge_ta", "opcm", "dc_merge", "core_space", "ace", "ip_merging"],
)
class TestCorners:
    @pytest.mark.parametrize("shape", [(6, 9), (1, 5), (1, 1)])
    def test_zero_task_vectors_give_the_base(self, name, shape):
        base = torch.randn(shape)
        assert torch.equal(get_anchor(name)(base, [base.clone(), base.clone()]), base)

    def test_inputs_are_not_written_and_more_tasks_than_rows_are_fine(self, name):
        base, experts = family(5, 3, 4)
        copies = [t.clone() for t in (base, *experts)]
        merged = get_anchor(name)(base, experts)
        assert merged.isfinite().all()
        assert all(torch.equal(a, b) for a, b in zip(copies, (base, *experts)))

    def test_equal_and_rank_deficient_experts_are_finite(self, name):
        base, (expert, _) = family(2, 8, 10)
        low = base + 0.1 * torch.outer(torch.arange(8.0), torch.ones(10))
        merged = get_anchor(name)(base, [expert, expert, low, base])
        assert merged.isfinite().all()
        assert float((merged - base).norm()) > 0

    @pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (), (1,), (99,), (3, 2, 2)])
    def test_tensors_of_awkward_shapes(self, name, shape):
        rule = get_anchor(name)
        if rule.scope == "module" and len(shape) != 2:
            return  # the engine hands it no other tensors
        base = torch.randn(shape)
        merged = rule(base, [base + 0.1, base - 0.2])
        assert merged.shape == base.shape
        assert merged.isfinite().all()


# Not KnOTS, whose support is absolute, and what takes steps of Adam, which are.
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**40])
@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi", "opcm"])
def test_scales_with_the_weights(name, scale):
    base, experts = family(3, 6, 8, dtype=torch.float64)
    options = {"solver": "closed_form"} if name == "wudi" else {}
    merged = get_anchor(name)(base, experts, **options)
    scaled = get_anchor(name)(base * scale, [e * scale for e in experts], **options)
    torch.testing.assert_close(scaled / scale, merged, rtol=1e-9, atol=1e-9)


def test_tasks_without_directions_do_not_disturb_the_others():
    base, (expert,) = family(1, 12, 20, dtype=torch.float64)
    u, s, vh = svd(expert - base)
    merged = get_anchor("tsv_m")(base, [expert, base.clone()])
    torch.testing.assert_close(merged, base + (u[:, :6] * s[:6]) @ vh[:6], rtol=0, atol=1e-9)


def low_rank_family(out=14, width=11, ranks=(2, 3, 1)):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(out, width, generator=generator, dtype=torch.float64)
    products = [
        LowRank(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in ((out, r), (r, width))))
        for r in ranks
    ]
    return base, [base + p.left @ p.right for p in products], products


@pytest.mark.parametrize("name", ["tsv_m", "wudi", "knots", "doge_ta"])
def test_products_give_what_their_matrices_give(name):
    base, experts, products = low_rank_family()
    parameters = {"steps": 20} if name == "doge_ta" else {}
    dense = get_anchor(name)(base, experts, **parameters)
    torch.testing.assert_close(
        get_anchor(name)(base, experts, low_rank=products, **parameters), dense, rtol=0, atol=1e-9
    )
    mixed = get_anchor(name)(base, experts, low_rank=[None, *products[1:]], **parameters)
    torch.testing.assert_close(mixed, dense, rtol=0, atol=1e-9)


def test_tsv_m_reads_products_from_their_factors():
    base, experts, products = low_rank_family()
    wrong = [torch.zeros_like(e) for e in experts]
    assert torch.equal(
        get_anchor("tsv_m")(base, wrong, low_rank=products), get_anchor("tsv_m")(base, experts, low_rank=products)
    )


def test_polar_of_rank_deficient_and_zero_matrices():
    matrix = torch.randn(8, 2) @ torch.randn(2, 5)
    truth = svd(matrix.double())
    completed, mean = polar_factor(matrix)
    assert mean == pytest.approx(float(truth[1].mean()), rel=1e-9)
    torch.testing.assert_close(completed.T @ completed, torch.eye(5).double(), rtol=0, atol=1e-9)
    exact = torch.randn(8, 2).double() @ torch.randn(2, 5).double()
    u, _, vh = svd(exact)
    torch.testing.assert_close(polar_factor(exact, complete=False)[0], u[:, :2] @ vh[:2], rtol=0, atol=1e-9)
    zero, mean = polar_factor(torch.zeros(3, 4))
    assert mean == 0
    assert not zero.any()


@pytest.mark.parametrize("ratio", [1e-2, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("size", [1e-100, 1.0, 1e120])
@pytest.mark.parametrize("tall", [False, True])
def test_polar_and_triples_are_accurate_whatever_the_condition(ratio, size, tall):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 12, generator=generator, dtype=torch.float64))[0] for n in (12, 20))
    s = size * torch.logspace(0, math.log10(ratio), 12, dtype=torch.float64)
    matrix = (u * s) @ v.T
    matrix, truth = (matrix.T, (u @ v.T).T) if tall else (matrix, u @ v.T)
    factor, mean = polar_factor(matrix)
    torch.testing.assert_close(factor, truth, rtol=0, atol=1e-6)
    assert mean == pytest.approx(float(s.mean()), rel=1e-9)
    for count in (3, None):
        left, values, right = singular_triples(matrix, count)
        torch.testing.assert_close(values, s[:count], rtol=1e-5, atol=0)
        for basis in (left.T @ left, right @ right.T):
            torch.testing.assert_close(basis, torch.eye(len(values)).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(((left * values) @ right) @ right.T, matrix @ right.T, rtol=0, atol=1e-6 * size)


class Model:
    """A whole model of several tensors, as a reduction sees it; those named so are weights of linear modules."""

    def __init__(self, name, base, experts, **parameters):
        self.rule = get_anchor(name)
        self.base, self.experts = base, experts
        self.parameters = self.rule.parameters(parameters).at("", 0.0, len(experts))

    def sites(self):
        for name, tensor in self.base.items():
            linear = name.endswith("linear")
            yield Site(name, tensor, [e[name] for e in self.experts], self.parameters, tuple(tensor.shape), 0, linear)

    def map(self, function):
        return map(function, self.sites())

    def constant(self, parameter):
        return self.parameters[parameter]

    def merge(self):
        state = self.rule.reduce(self)
        return {site.name: self.rule.apply(site, state) for site in self.sites()}


def model_family(tasks=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    shapes = {"a.linear": (10, 14), "a.bias": (10,), "b.linear": (16, 9), "embedding": (13, 4), "scale": ()}
    base = {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in shapes.items()}
    sizes = {n: 0.02 * (i + 1) for i, n in enumerate(shapes)}
    experts = [
        {n: b + sizes[n] * torch.randn(b.shape, generator=generator, dtype=dtype) for n, b in base.items()}
        for _ in range(tasks)
    ]
    return base, experts


def ties(vectors, share):
    """Yadav et al. 2023 on flat vectors: by kthvalue over all of them, then elect and average."""
    flat = torch.stack(vectors)
    k = flat.shape[1] - int(flat.shape[1] * share)
    if k:
        flat = flat * (flat.abs() >= flat.abs().kthvalue(k, dim=1, keepdim=True).values)
    sign = flat.sum(0).sign()
    sign[sign == 0] = 1.0 if sign.sum() > 0 else -1.0
    agreeing = flat * (flat.sign() == sign)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


@pytest.mark.parametrize("share", [None, 0.5, 1.0])
def test_knots_is_ties_over_the_coordinates_of_the_whole_model(share):
    base, experts = model_family()
    bases, coordinates = {}, {}
    for name, start in base.items():
        parts = [e[name] - start for e in experts]
        if name.endswith("linear"):
            u, s, vh = svd(torch.cat(parts, 1))
            u, s, vh = u[:, s > 1e-5], s[s > 1e-5], vh[s > 1e-5]
            bases[name] = u
            parts = list((torch.diag(s) @ vh).split(start.shape[1], 1))
        coordinates[name] = parts
    merged = ties([torch.cat([coordinates[n][t].reshape(-1) for n in base]) for t in range(3)], share or 0.2)
    got = Model("knots", base, experts, density=share).merge() if share else Model("knots", base, experts).merge()
    for name, part in zip(base, merged.split([coordinates[n][0].numel() for n in base])):
        part = part.reshape(coordinates[name][0].shape)
        truth = base[name] + 0.6 * (bases[name] @ part if name in bases else part)
        torch.testing.assert_close(got[name], truth, rtol=0, atol=1e-9)


def test_knots_dare_drops_at_random_by_seed_tensor_and_expert():
    base, (expert, _) = family(2, 40, 60, dtype=torch.float64)
    rule = get_anchor("knots")
    whole = rule(base, [expert], combine="dare_ties", density=1.0, scaling=1.0)
    torch.testing.assert_close(whole, expert, rtol=0, atol=1e-9)
    u = svd(expert - base)[0]
    kept = {}
    for seed in (0, 1):
        merged = rule(base, [expert], combine="dare_ties", scaling=1.0, seed=seed)
        assert torch.equal(merged, rule(base, [expert], combine="dare_ties", scaling=1.0, seed=seed))
        ratio = (u.T @ (merged - base)) / (u.T @ (expert - base))
        kept[seed] = ratio.abs() > 0.5
        torch.testing.assert_close(ratio[kept[seed]], torch.full_like(ratio[kept[seed]], 1 / 0.9), rtol=0, atol=1e-6)
        assert float(kept[seed].double().mean()) == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 2400))
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(
        rule(base, [expert], combine="dare_ties", name="other"), rule(base, [expert], combine="dare_ties")
    )


def doge_oracle(base, experts, steps=30):
    """Wei et al. 2025 with autograd; Adam written out from arXiv 1412.6980."""
    deltas, scales = {}, {}
    linear = [n for n in base if n.endswith("linear")]
    for name in linear:
        parts = torch.stack([e[name] - base[name] for e in experts])
        small = min(base[name].shape)
        lam = 0.07 / parts.flatten(1).norm(dim=1)
        own = [svd(p)[0][:, : small // len(experts)] for p in parts]
        shared = svd(torch.cat(own, 1))[0][:, : small // 6]
        outside = torch.eye(len(base[name])).double() - shared @ shared.T
        delta = torch.zeros_like(base[name], requires_grad=True)
        m, v = torch.zeros_like(base[name]), torch.zeros_like(base[name])
        for step in range(1, steps + 1):
            with torch.enable_grad():
                merged = (lam[:, None, None] * (parts + delta)).sum(0)
                loss = (parts * (parts - merged)).sum(2).square().sum()
            (gradient,) = torch.autograd.grad(loss, delta)
            gradient = outside @ gradient
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            change = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            delta = (delta - 1e-4 * change).detach().requires_grad_()
        deltas[name], scales[name] = delta.detach(), lam
    truth = dict(base)
    for t, expert in enumerate(experts):
        flat = torch.cat([(expert[n] - base[n]).reshape(-1) for n in linear]).abs()
        threshold = flat.kthvalue(len(flat) - int(0.3 * len(flat))).values
        for name in linear:
            tau = expert[name] - base[name]
            truth[name] = truth[name] + scales[name][t] * (tau.abs() >= threshold) * (tau + deltas[name])
    return truth


def test_doge_ta_matches_its_formula_over_a_model():
    base, experts = model_family()
    got = Model("doge_ta", base, experts, steps=30).merge()
    for name, truth in doge_oracle(base, experts).items():
        torch.testing.assert_close(got[name], truth, rtol=0, atol=1e-10)
    assert all(torch.equal(got[n], base[n]) for n in base if not n.endswith("linear"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(Model("doge_ta", {"scale": base["scale"]}, experts).merge().values(), [base["scale"]])
    )


def test_parameters_out_of_range_are_refused():
    base, experts = family()
    for name, key, value in [
        ("iso_cts", "common_fraction", 1.2),
        ("knots", "combine", "mean"),
        ("knots", "density", 0.0),
        ("opcm", "alpha", 1.0),
        ("doge_ta", "subspace", 0),
        ("wudi", "steps", 0),
    ]:
        with pytest.raises(ConfigError, match=key):
            get_anchor(name)(base, experts, **{key: value})

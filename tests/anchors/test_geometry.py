"""The geometric rules against float64 oracles written from their formulas, and the laws of the sphere."""

from __future__ import annotations

import math

import pytest
import torch

from bmm_engine.anchors import get_anchor
from bmm_engine.errors import ConfigError

SHAPES = [(6, 9), (9, 6), (1, 7), (7,), (1,), (), (3, 4, 2)]
SCALES = [1e-20, 1.0, 1e15]


def rule(name, base, experts, **parameters):
    return get_anchor(name)(base, experts, **parameters)


def family(shape=(6, 9), experts=3, scale=1.0, spread=0.3, seed=0):
    """A base and experts around it, of different distances, all of order `scale`."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * scale
    return base, [base + spread * (t + 1) * scale * torch.randn(shape, generator=generator) for t in range(experts)]


def assert_close(got, truth, rtol=1e-6):
    """Frobenius."""
    assert got.dtype == torch.float32
    assert got.shape == truth.shape
    error, size = float((got.double() - truth).norm()), float(truth.norm())
    assert error <= rtol * size, f"{error / size:.2e}"


def slerp_oracle(a, b, t, threshold=1.0):
    a, b = a.double(), b.double()
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    if abs(cosine) > threshold or abs(cosine) > 1 - 1e-13:
        return (1 - t) * a + t * b
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def log_map(m, u):
    cosine = float((m * u).sum().clamp(-1, 1))
    theta = math.acos(cosine)
    return torch.zeros_like(m) if theta < 1e-9 else theta / math.sin(theta) * (u - cosine * m)


def exp_map(m, v):
    length = float(v.norm())
    return m if length == 0 else math.cos(length) * m + math.sin(length) / length * v


def karcher_oracle(points, weights, steps=1000):
    """The mean's direction by the plain iteration on whole vectors, to convergence, times the mean length."""
    units = [p / p.norm() for p in points]
    mean = sum(w * u for w, u in zip(weights, units))
    mean = mean / mean.norm()
    for _ in range(steps):
        mean = exp_map(mean, sum(w * log_map(mean, u) for w, u in zip(weights, units)))
    return mean * sum(w * float(p.norm()) for w, p in zip(weights, points))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if math.prod(s) > 1])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.2])
def test_slerp(t, shape, scale):
    base, (expert, *_) = family(shape, scale=scale)
    assert_close(rule("slerp", base, [expert], t=t), slerp_oracle(base, expert, t, 0.9995))
    if t in (0.0, 1.0):
        assert torch.equal(rule("slerp", base, [expert], t=t), (base, expert)[int(t)])


def test_slerp_takes_the_straight_line_above_its_threshold():
    base, (expert, *_) = family(spread=0.01)
    line, curve = (base.double() + expert.double()) / 2, slerp_oracle(base, expert, 0.5)
    assert float((line - curve).norm() / line.norm()) > 1e-5  # the two differ by more than the tolerance
    assert_close(rule("slerp", base, [expert]), line)
    assert_close(rule("slerp", base, [expert], threshold=1.0), curve)
    with pytest.raises(ConfigError, match=r"threshold = 1\.5"):
        rule("slerp", base, [expert], threshold=1.5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair", ["parallel", "opposite", "zero base", "zero expert", "both zero"])
def test_slerp_where_there_is_no_arc_is_linear(pair, shape):
    v = torch.randn(shape)
    base, expert = {
        "parallel": (v, 3 * v),
        "opposite": (v, -1.7 * v),
        "zero base": (0 * v, v),
        "zero expert": (v, 0 * v),
        "both zero": (0 * v, 0 * v),
    }[pair]
    for threshold in (0.9995, 1.0):
        got = rule("slerp", base, [expert], t=0.3, threshold=threshold)
        assert_close(got, 0.7 * base.double() + 0.3 * expert.double())


@pytest.mark.parametrize("angle", [1e-9, 1e-6, 1e-4, 0.03, 1.0, math.pi - 0.03, math.pi - 1e-3])
def test_slerp_is_accurate_at_all_angles(angle):
    a = torch.nn.functional.normalize(torch.randn(50, dtype=torch.float64), dim=0)
    b = torch.randn(50, dtype=torch.float64)
    b = torch.nn.functional.normalize(b - (a @ b) * a, dim=0)
    got = get_anchor("slerp")(a, [math.cos(angle) * a + math.sin(angle) * b], t=0.25, threshold=1.0)
    truth = math.cos(angle / 4) * a + math.sin(angle / 4) * b
    assert float((got - truth).norm()) < 1e-9


@pytest.mark.parametrize("origin", ["base", "zero"])
@pytest.mark.parametrize("vectors", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nuslerp(shape, vectors, origin):
    base, experts = family(shape, experts=2)
    start = base.double() if origin == "base" else torch.zeros(shape, dtype=torch.float64)
    a, b = (e.double() - start for e in experts)
    if vectors == "tensor" or len(shape) < 2:
        truth = slerp_oracle(a, b, 0.75)
    elif vectors == "rows":
        truth = torch.stack([slerp_oracle(x, y, 0.75) for x, y in zip(a, b)])
    else:
        columns = zip(a.flatten(1).unbind(1), b.flatten(1).unbind(1))
        truth = torch.stack([slerp_oracle(x, y, 0.75) for x, y in columns], dim=1).reshape(shape)
    got = rule("nuslerp", base, experts, weights=[1.0, 3.0], origin=origin, vectors=vectors)
    assert_close(got, start + truth)
    swapped = rule("nuslerp", base, experts[::-1], weights=[3.0, 1.0], origin=origin, vectors=vectors)
    assert_close(swapped, start + truth)


def test_nuslerp_of_more_rows_than_a_slab_holds():
    base, experts = family((700, 900), experts=2)
    got = rule("nuslerp", base, experts, vectors="rows")
    rows = [0, 290, 291, 292, 699]
    for row in rows:
        assert torch.equal(got[row], rule("nuslerp", base[row], [e[row] for e in experts]))


def test_nuslerp_rejects_weights_that_cancel():
    with pytest.raises(ConfigError, match=r"\[1\.0, -1\.0\] sum to 0"):
        rule("nuslerp", *family(experts=2), weights=[1.0, -1.0])
    with pytest.raises(ConfigError, match="exactly 2"):
        rule("nuslerp", *family(experts=3))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("origin", ["base", "zero"])
@pytest.mark.parametrize("shape", [(6, 9), (7,), (3, 4, 2)])
def test_multislerp(shape, origin, scale):
    base, experts = family(shape, scale=scale)
    start = base.double() if origin == "base" else torch.zeros(shape, dtype=torch.float64)
    points = [e.double() - start for e in experts]
    units = [p / p.norm() for p in points]
    weights = [0.2, 0.3, 0.5]
    mean = sum(w * u for w, u in zip(weights, units))
    mean = mean / mean.norm()
    length = sum(w * float(p.norm()) for w, p in zip(weights, points))
    projected = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units))
    logarithm = sum(w * log_map(mean, u) for w, u in zip(weights, units))
    given = {"weights": [2.0, 3.0, 5.0], "origin": origin}
    assert_close(rule("multislerp", base, experts, **given), start + length * exp_map(mean, projected))
    assert_close(rule("multislerp", base, experts, **given, tangent="log"), start + length * exp_map(mean, logarithm))


def test_multislerp_by_logarithms_is_slerp_for_two_units():
    a, b = (torch.nn.functional.normalize(torch.randn(20), dim=0) for _ in range(2))
    given = {"origin": "zero", "weights": [0.7, 0.3]}
    assert_close(rule("multislerp", 0 * a, [a, b], tangent="log", **given), slerp_oracle(a, b, 0.3))
    chord = 0.7 * a.double() + 0.3 * b.double()
    assert_close(rule("multislerp", 0 * a, [a, b], **given), chord / chord.norm())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("origin", ["base", "zero"])
def test_karcher(origin, scale):
    base, experts = family((6, 9), experts=4, scale=scale)
    start = base.double() if origin == "base" else 0 * base.double()
    truth = karcher_oracle([e.double() - start for e in experts], [0.1, 0.2, 0.3, 0.4])
    given = {"origin": origin, "weights": [1.0, 2.0, 3.0, 4.0]}
    assert_close(rule("karcher", base, experts, **given, steps=200, tolerance=1e-12), start + truth)
    assert_close(rule("karcher", base, experts, **given), start + truth, rtol=1e-4)


def test_karcher_of_two_units_is_their_midpoint():
    a, b = (torch.nn.functional.normalize(torch.randn(20), dim=0) for _ in range(2))
    assert_close(rule("karcher", 0 * a, [a, b], tolerance=1e-9), slerp_oracle(a, b, 0.5))
    assert_close(rule("karcher", 0 * a, [a, b], weights=[0.25, 0.75], tolerance=1e-9), slerp_oracle(a, b, 0.75))


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
@pytest.mark.parametrize("origin", ["base", "zero"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_experts_give_that_expert(shape, origin, name):
    base, (expert, *_) = family(shape)
    for experts in ([expert], [expert] * 2, [expert] * 5):
        assert_close(rule(name, base, experts, origin=origin), expert.double())


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_zero_and_opposite_vectors(name):
    base, (expert, other, _) = family()
    tau = expert.double() - base.double()
    got = rule(name, base, [base, base, base], origin="base")
    assert torch.equal(got, base)  # a tensor that nobody tuned
    assert_close(rule(name, base, [base, expert], origin="base"), base.double() + tau / 2)  # only the length halves
    got = rule(name, base, [base, expert, other], origin="base").double() - base.double()
    with_two = rule(name, base, [expert, other], origin="base").double() - base.double()
    torch.testing.assert_close(got, with_two * 2 / 3, rtol=1e-4, atol=1e-6)
    opposite = base + 2 * (base - expert)
    line = (expert.double() + opposite.double()) / 2
    assert_close(rule(name, base, [expert, opposite], origin="base"), line, rtol=1e-6)
    zero = torch.zeros(8)
    axes = torch.eye(8)
    with pytest.raises(ConfigError, match=r"tensor: the directions .* cancel out"):
        rule(name, zero, [axes[0], axes[1], -axes[0], -axes[1]], origin="zero")


def test_one_number_is_averaged_not_rotated():
    """The sphere of one dimension is two points: opposite signs have no path between them."""
    base, plus, minus = torch.tensor([0.5]), torch.tensor([2.0]), torch.tensor([-1.0])
    for name in ("karcher", "multislerp", "nuslerp"):
        assert rule(name, base, [plus, minus], origin="zero").tolist() == [0.5]
    assert rule("slerp", plus, [minus]).tolist() == [0.5]


@pytest.mark.parametrize("average", ["cosine", "angle"])
@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_model_stock(shape, scale, filter_wise, average):
    base, experts = family(shape, scale=scale)
    common = torch.randn(shape) * scale  # so that the cosines are mostly positive, as the paper has them
    experts = [e + common for e in experts]

    def whole(w0, ws):
        taus = [w - w0 for w in ws]
        pairs = [(a, b) for i, a in enumerate(taus) for b in taus[i + 1 :]]
        cosines = [float((a * b).sum() / (a.norm() * b.norm())) for a, b in pairs]
        c = sum(cosines) / len(cosines)
        if average == "angle":
            c = math.cos(sum(math.acos(max(-1.0, min(1.0, x))) for x in cosines) / len(cosines))
        t = 3 * c / (1 + 2 * c)
        return t * sum(ws) / 3 + (1 - t) * w0

    w0, ws = base.double(), [e.double() for e in experts]
    truth = whole(w0, ws)
    if filter_wise and len(shape) > 1:
        truth = torch.stack([whole(w0[i], [w[i] for w in ws]) for i in range(shape[0])])
    assert_close(rule("model_stock", base, experts, filter_wise=filter_wise, average=average), truth)


def test_model_stock_laws():
    base, (expert, *_) = family()
    assert_close(rule("model_stock", base, [expert] * 3), expert.double())
    assert torch.equal(rule("model_stock", base, [base, base]), base)
    tau = expert - base
    assert torch.equal(rule("model_stock", base, [base + tau, base - tau]), base)  # opposite: nothing in common
    zero, axes = torch.zeros(4), torch.eye(4)
    assert torch.equal(rule("model_stock", zero, [axes[0], axes[1]]), zero)  # orthogonal: t = 0
    small = [zero + 1e-9 * (axes[0] + axes[1]), zero + 1e-9 * axes[0]]  # tiny task vectors have an angle too
    cosine = math.sqrt(0.5)
    mean = (small[0].double() + small[1].double()) / 2
    assert_close(rule("model_stock", zero, small), 2 * cosine / (1 + cosine) * mean)
    with pytest.raises(ConfigError, match="at least 2"):
        rule("model_stock", base, [expert])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.1, 10.0])
def test_nearswap(t, shape):
    base, (expert, *_) = family(shape)
    difference = (expert.double() - base.double()).abs()
    w = (t / difference).clamp(max=1)
    assert_close(rule("nearswap", base, [expert], t=t), w * expert.double() + (1 - w) * base.double())
    assert torch.equal(rule("nearswap", base, [base], t=t), base)
    assert torch.equal(rule("nearswap", base, [expert], t=0), base)


def test_passthrough():
    base, (expert, *_) = family()
    assert torch.equal(rule("passthrough", base, [expert]), expert)
    assert torch.equal(rule("passthrough", base, [expert], scale=0.5), expert * 0.5)
    with pytest.raises(ConfigError, match="exactly 1"):
        rule("passthrough", base, [expert, expert])


@pytest.mark.parametrize("shape", SHAPES)
def test_arcee_fusion(shape):
    base, (expert, *_) = family(shape)
    a, b = base.double(), expert.double()
    p, q = (torch.softmax(x, dim=-1) + 1e-8 for x in (b, a))
    importance = (b - a).abs() * (p * (p / q).log()).sum(-1, keepdim=True).reshape((*shape[:-1], 1) if shape else ())
    ordered = importance.flatten().sort().values
    q1, median, q3 = (ordered[int(s * (len(ordered) - 1))] for s in (0.25, 0.5, 0.75))
    mask = importance >= median + 1.5 * (q3 - q1)
    got = rule("arcee_fusion", base, [expert])
    assert torch.equal(got, torch.where(mask, expert, base))
    if math.prod(shape) > 20:
        assert 0 < int(mask.sum()) < math.prod(shape) / 3
    assert torch.equal(rule("arcee_fusion", base, [base]), base)


@pytest.mark.parametrize(
    "name", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock", "nearswap", "passthrough"]
)
def test_float64_strided_views_and_untouched_inputs(name):
    """In float64 what is widened is the input itself."""
    base, experts = family((9, 6), experts=get_anchor(name).experts[1] or 2)
    base, experts = base.double(), [e.double() for e in experts]
    copies = [x.clone() for x in (base, *experts)]
    turned = rule(name, base.mT, [e.mT for e in experts])
    assert turned.dtype == torch.float64
    torch.testing.assert_close(turned, rule(name, base, experts).mT, rtol=1e-14, atol=1e-14)
    assert all(torch.equal(x, y) for x, y in zip(copies, (base, *experts)))

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from bmm_engine.errors import BackendError, ConfigError, NonFiniteWeightError, ShapeMismatchError
from bmm_engine.ops.blend import blend, magnitude_sums, reference, sign_balance
from bmm_engine.ops.blend.rule import COMBINES
from tests.numerics import assert_as_good_as_torch
from tests.ops.backends import each_backend, needs_cpu

pytestmark = pytest.mark.usefixtures("poisoned_empty")

each = each_backend("torch", "cpu")
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = [F32, BF16, F16, F64]
MIXED = [F16, BF16, F32, F16]
# Empty, one element, fewer than a vector, spans of 256 and 512 elements that end anywhere, several work items.
SHAPES = [(0,), (1,), (), (255,), (7, 73), (2, 3, 171)]
MANY = (65_536 + 1031,)

RULES = [
    {"combine": "sum"},
    *(
        {"combine": c, "normalize": n, "tie": tie}
        for c, n, tie in (("elect_sum", False, 1), ("elect_count", False, -1))
    ),
    *({"combine": c, "normalize": n, "tie": tie} for c, n, tie in (("elect_sum", True, -1), ("elect_count", True, 1))),
    {"combine": "largest"},
    {"combine": "mean_kept", "unique": [1.5, 0.75, 2.0, 1.0]},
    {"combine": "consensus", "dominance": [0.5, 1.0, 0.25, 2.0]},
    {"combine": "consensus", "dominance": [0.25] * 4, "votes": 3},
]
MASKS = ["none", "bounds", "chance", "ranks and bounds"]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
each_mask = pytest.mark.parametrize("mask", MASKS)


def on_a_grid(shape, dtypes):
    """Base and experts with few significant bits: differences and sums are exact, ties and zeros are common."""
    base = torch.randint(-64, 65, shape) / 16
    experts = [(base + torch.randint(-4, 5, shape) / 16).clamp(-4, 4) for _ in dtypes[1:]]
    return [x.to(dtype) for x, dtype in zip([base, *experts], dtypes)]


def at_random(shape, dtypes):
    base = torch.randn(shape, dtype=F64)
    experts = [base + 0.1 * torch.randn(shape, dtype=F64) for _ in dtypes[1:]]
    return [x.to(dtype) for x, dtype in zip([base, *experts], dtypes)]


def options_of(mask, shape, count=4):
    bounds = {"lower": [0.0625, None, 0.1, 0.0][:count], "upper": [0.1875, 0.125, None, 1.0][:count]}
    seeds = [7, 2**64 - 1, 7, 2**63][:count]
    if mask == "none":
        return {}
    if mask == "bounds":
        return bounds
    if mask == "chance":
        return {"keep": [0.5, 0.9, None, 0.25][:count], "seeds": seeds, "first": 3}
    ranks = [torch.rand(shape), torch.rand(shape), torch.rand(shape), None][:count]
    return {**bounds, "keep": [(0.25, 0.75), (1.0, 0.5), (0.0, 1.0), 0.5][:count], "seeds": seeds, "ranks": ranks}


def u_of(seed, index):
    """With Python's integers."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return ((z ^ z >> 31) >> 40) / 2**24


def definition(base, experts, *, weights=None, scales=None, combine="sum", scaling=1.0, **options):
    """By NumPy in float64, one element after the other."""
    b = base.double().flatten().numpy()
    xs = [x.double().flatten().numpy() for x in experts]
    T, first = len(xs), options.get("first", 0)
    weights, scales = weights or [1.0] * T, scales or [1.0] * T
    result = np.empty_like(b)
    for i in range(len(b)):
        v, kept = [0.0] * T, [False] * T
        for t in range(T):
            d = xs[t][i] - b[i]
            low = (options.get("lower") or [None] * T)[t]
            high = (options.get("upper") or [None] * T)[t]
            p = (options.get("keep") or [None] * T)[t]
            inside = (low is None or np.float32(abs(d)) >= np.float32(low)) and (
                high is None or np.float32(abs(d)) <= np.float32(high)
            )
            if inside and p is not None:
                if isinstance(p, tuple):
                    rank = options["ranks"][t].flatten()[i].item()
                    p = p[0] + (p[1] - p[0]) * rank
                inside = u_of(options["seeds"][t], first + i) < p
            if inside:
                kept[t], v[t] = True, weights[t] * scales[t] * d
        result[i] = b[i] + scaling * combined(v, kept, weights, combine, options)
    return torch.from_numpy(result).view(base.shape)


def combined(v, kept, weights, combine, options):
    T, total = len(v), sum(v)
    if combine == "sum":
        return total
    if combine == "largest":
        return max(reversed(v), key=abs)
    if combine == "mean_kept":
        n = sum(kept)
        if n == 1:
            return v[kept.index(True)] * (options.get("unique") or [1.0] * T)[kept.index(True)]
        return total / n if n else 0.0
    if combine == "consensus":
        votes = sum(abs(v[t]) > options["dominance"][t] * abs(total - v[t]) for t in range(T))
        return total if votes >= options.get("votes", 2) else 0.0
    s = np.sign(total) if combine == "elect_sum" else np.sign(sum(np.sign(v)))
    s = s or options.get("tie", 1)
    agree = [t for t in range(T) if v[t] != 0 and np.sign(v[t]) == s]
    m = sum(v[t] for t in agree)
    return m / (sum(weights[t] for t in agree) or 1.0) if options.get("normalize") else m


@each
@each_rule
@each_mask
@pytest.mark.parametrize("dtypes", [[F32] * 5, [BF16, *MIXED], [F64, *MIXED]], ids=["float32", "16 bits", "float64"])
def test_equals_the_definition(backend, rule, mask, dtypes):
    for shape in SHAPES:
        base, *experts = on_a_grid(shape, dtypes)
        options = {**rule, **options_of(mask, shape), "scaling": 0.5}
        options |= {"weights": [0.5, 1.0, 2.0, 1.0], "scales": [1.0, 1.0, 0.5, 0.25]}
        W = blend(base, experts, **options, backend=backend)
        assert W.dtype == (F64 if F64 in dtypes else F32)
        truth = definition(base, experts, **options)
        if rule.get("normalize") or rule["combine"] == "mean_kept":  # a quotient is rounded
            assert_as_good_as_torch(W, truth.to(W.dtype), truth)
        else:
            assert torch.equal(W.double(), truth)


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", ["sum", "largest"])
def test_errs_as_little_as_its_dtype_allows(backend, dtype, combine):
    base, *experts = at_random((1537,), [dtype] * 5)
    options = {"weights": [0.3, 0.1, -0.7, 1.1], "scaling": 0.77, "combine": combine, "backend": backend}
    for out_dtype in DTYPES if dtype == F64 else [F32, BF16, F16]:
        W = blend(base, experts, **options, out_dtype=out_dtype)
        truth = definition(base, experts, weights=options["weights"], scaling=0.77, combine=combine)
        assert_as_good_as_torch(W, truth.to(out_dtype), truth)


@needs_cpu
@each_rule
@each_mask
@pytest.mark.parametrize("dtypes", [*([dtype] * 5 for dtype in DTYPES), [F64, *MIXED], [BF16, *MIXED]])
def test_backends_give_the_same_bits(rule, mask, dtypes):
    base, *experts = at_random((3001,), dtypes)
    options = {"weights": [0.3, 0.1, -0.7, 1.1], "scales": [1.7, 0.2, 1.0, 3.0], "scaling": 0.77, **rule}
    options |= options_of(mask, base.shape)
    for out_dtype in DTYPES:
        pair = [blend(base, experts, **options, out_dtype=out_dtype, backend=name) for name in ("cpu", "torch")]
        assert torch.equal(*pair)


@each
@each_rule
@each_mask
@pytest.mark.parametrize("dtype", [BF16, F64])
def test_bits_do_not_depend_on_threads_or_slices(backend, rule, mask, dtype, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK", 777)
    shape = MANY if backend == "cpu" else (2000,)
    base, *experts = at_random(shape, [dtype] * 5)
    options = {"weights": [0.3, 0.1, -0.7, 1.1], **rule, **options_of(mask, shape)}
    first, ranks = options.pop("first", 0), options.pop("ranks", [None] * 4)
    expected = blend(base, experts, **options, first=first, ranks=ranks, backend=backend)
    for threads in (2, 5) if backend == "cpu" else ():
        torch.set_num_threads(threads)
        assert torch.equal(blend(base, experts, **options, first=first, ranks=ranks, backend=backend), expected)
    cuts = [0, 1, 4, 300, 1111, base.numel() // 2 + 7, base.numel()]
    for begin, end in itertools.pairwise(cuts):
        part = slice(begin, end)
        some = blend(
            base[part],
            [x[part] for x in experts],
            **options,
            first=first + begin,
            ranks=[None if r is None else r[part] for r in ranks],
            backend=backend,
        )
        assert torch.equal(some, expected[part])


@each
@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15])
@pytest.mark.parametrize("first", [0, 12345, 2**40])
def test_chance_is_the_integers_own(backend, seed, first):
    n, p = 1000, 0.37
    base = torch.zeros(n)
    W = blend(base, [base + 1], keep=[p], seeds=[seed], first=first, backend=backend)
    u = [u_of(seed, first + i) for i in range(n)]
    assert W.tolist() == [float(value < np.float32(p)) for value in u]
    assert torch.equal(reference.uniform(seed, first, n, base.device).double(), torch.tensor(u, dtype=F64))


@each
def test_chance_keeps_the_share_that_was_asked_for(backend):
    n = 200_000
    base, ranks = torch.zeros(n), torch.linspace(0, 1, n)
    kept = [
        blend(base, [base + 1], keep=[p], seeds=[5], ranks=[r], backend=backend)
        for p, r in ((0.0, None), (1.0, None), (0.3, None), ((0.1, 0.5), ranks))
    ]
    assert not kept[0].any()
    assert kept[1].all()
    assert kept[2].mean().item() == pytest.approx(0.3, abs=0.005)
    assert kept[3][: n // 10].mean().item() == pytest.approx(0.12, abs=0.01)
    assert kept[3][-n // 10 :].mean().item() == pytest.approx(0.48, abs=0.01)
    inverse = blend(base, [base + 1], keep=[(0.1, 0.5)], seeds=[5], ranks=[ranks], inverse=True, backend=backend)
    torch.testing.assert_close(inverse, torch.where(kept[3] > 0, 1 / (0.1 + 0.4 * ranks), 0.0))
    assert inverse.mean().item() == pytest.approx(1, abs=0.01), "its expectation is what was there"
    other = blend(base, [base + 1], keep=[0.3], seeds=[6], backend=backend)
    assert (kept[2] * other).mean().item() == pytest.approx(0.09, abs=0.005)


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [{"combine": "sum"}, {"combine": "largest", "upper": [0.1] * 3}])
def test_what_is_not_finite_is_named(backend, dtype, value, rule):
    for index, where in itertools.product(range(4), (0, 300, 1000)):
        tensors = at_random((1001,), [dtype] * 4)
        tensors[index][where] = value
        tensors[3][5] = value
        count = 2 if index == 3 else 1
        name = "base" if index == 0 else rf"experts\[{index - 1}\]"
        for function, options in ((blend, rule), (sign_balance, {k: v for k, v in rule.items() if k != "combine"})):
            with pytest.raises(NonFiniteWeightError, match=rf"{count} of 1001 entries of {name}") as caught:
                function(tensors[0], tensors[1:], **options, backend=backend)
            assert caught.value.index == index


@each
def test_the_largest_finite_numbers_are_finite(backend):
    for dtype in DTYPES:
        x = torch.full((600,), torch.finfo(dtype).max, dtype=dtype)
        assert torch.equal(blend(x, [x, x], out_dtype=dtype, backend=backend), x)


@each
@pytest.mark.parametrize("shape", SHAPES)
def test_out_may_be_new_or_an_input(backend, shape):
    base, *experts = at_random(shape, [BF16] * 3)
    expected = blend(base, experts, combine="elect_sum", out_dtype=BF16, backend=backend)
    for out in (torch.empty_like(base), base.clone(), experts[1].clone()):
        inputs = [base, *experts]
        for t in range(3):
            if torch.equal(inputs[t], out):
                inputs[t] = out
        assert blend(inputs[0], inputs[1:], combine="elect_sum", out=out, backend=backend) is out
        assert torch.equal(out, expected)


@each
def test_many_experts_and_the_order_of_sums(backend):
    base, *experts = at_random((1001,), [F32] * 41)
    total = torch.zeros_like(base)
    for expert in experts:
        total += (expert - base) * 0.1
    for combine, options in (("sum", {}), ("consensus", {"dominance": [0.0] * 40, "votes": 1})):
        W = blend(base, experts, weights=[0.1] * 40, combine=combine, **options, backend=backend)
        assert torch.equal(W, base + total)


@each
def test_an_election_without_weight_divides_by_one(backend):
    base = torch.zeros(5)
    W = blend(base, [base + 2, base + 3], weights=[1.0, -1.0], combine="elect_sum", normalize=True, backend=backend)
    assert torch.equal(W, torch.full((5,), 3.0))
    W = blend(
        base, [base + 2, base + 4, base - 1], weights=[1, -1, 1], combine="elect_sum", normalize=True, backend=backend
    )
    assert torch.equal(W, torch.full((5,), (-4.0 - 1.0) / 1.0))  # -1 + 1 = 0


@each
@pytest.mark.parametrize("dtypes", [[F32] * 4, [BF16, F16, F32, BF16], [F64, F32, F64, BF16]])
@pytest.mark.parametrize("shape", [*SHAPES, MANY])
def test_sign_balance(backend, dtypes, shape):
    base, *experts = on_a_grid(shape, dtypes)
    options = {"weights": [0.5, 1.0, 2.0], "scales": [1.0, 2.0, 0.5]}
    options |= {"lower": [0.0625, None, 0.1], "upper": [0.1875, 0.125, None]}
    total = 0
    for t, expert in enumerate(experts):
        d = expert.double() - base.double()
        low, high = options["lower"][t] or 0.0, options["upper"][t] or math.inf
        kept = (d.abs() >= np.float32(low).item()) & (d.abs() <= high)
        total = total + options["weights"][t] * options["scales"][t] * d * kept
    balance = sign_balance(base, experts, **options, backend=backend)
    assert balance == int(total.sign().sum())
    assert isinstance(balance, int)


@each
def test_strides(backend):
    base, expert = torch.randn(20, 30), torch.randn(30, 20).T
    if backend == "cpu":
        with pytest.raises(BackendError, match=r"not contiguous.*\(1, 20\)"):
            blend(base, [expert], backend="cpu")
    out = torch.full((30, 20), math.nan).T
    name = "auto" if backend == "cpu" else backend
    chance = {"keep": [0.5], "seeds": [3]}
    assert blend(base, [expert], out=out, **chance, backend=name) is out
    assert torch.equal(out, blend(base, [expert.contiguous()], **chance, backend=backend))


def test_takes_arrays_of_other_libraries():
    base, out = np.zeros(4, dtype=np.float32), np.empty(4, dtype=np.float32)
    assert blend(base, [base + 1, base + 2], out=out) is out
    assert out.tolist() == [3.0] * 4


@each_backend("torch")
@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [[F32] * 5, [BF16, *MIXED], [F64, *MIXED]], ids=["float32", "16 bits", "float64"])
def test_a_gpu_gives_what_the_cpu_gives(backend, dtypes):
    base, *experts = at_random((70_001,), dtypes)
    for mask, rule in itertools.product(MASKS, RULES):
        options = {**rule, **options_of(mask, base.shape)}
        expected = blend(base, experts, **options, backend=backend)
        options["ranks"] = [None if r is None else r.to("cuda") for r in options.get("ranks", [None] * 4)]
        W = blend(base.to("cuda"), [x.to("cuda") for x in experts], **options, backend=backend)
        torch.testing.assert_close(W.cpu(), expected, rtol=1e-6, atol=1e-6)


ones = torch.ones(4)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"experts": []}, ConfigError, "at least one"),
        ({"experts": [torch.ones(3)]}, ShapeMismatchError, r"experts\[0\].*\(3,\).*\(4,\)"),
        ({"experts": [ones.int()]}, ConfigError, r"experts\[0\].*int32"),
        ({"experts": [ones.to("meta")]}, ConfigError, "meta"),
        ({"combine": "median"}, ConfigError, "consensus, not 'median'"),
        ({"weights": [1.0, 2.0]}, ShapeMismatchError, "2 weights for 1"),
        ({"weights": [math.nan]}, ConfigError, r"weights\[0\].*nan"),
        ({"scales": [math.inf]}, ConfigError, r"scales\[0\].*inf"),
        ({"lower": [math.nan]}, ConfigError, r"lower\[0\]"),
        ({"keep": [0.5]}, ConfigError, "seeds"),
        ({"keep": [1.5], "seeds": [0]}, ConfigError, r"keep\[0\].*1.5"),
        ({"keep": [(0.5, math.nan)], "seeds": [0], "ranks": [ones]}, ConfigError, r"keep\[0\].*nan"),
        ({"keep": [(0.1, 0.5)], "seeds": [0]}, ConfigError, r"pair goes with ranks\[0\]"),
        ({"keep": [0.5], "seeds": [0], "ranks": [ones]}, ConfigError, "a number without"),
        ({"ranks": [ones]}, ConfigError, r"ranks\[0\].*keep"),
        ({"keep": [(0.1, 0.5)], "seeds": [0], "ranks": [ones.double()]}, ConfigError, "float64"),
        ({"keep": [(0.1, 0.5)], "seeds": [0], "ranks": [ones[:3]]}, ShapeMismatchError, r"ranks\[0\].*\(3,\)"),
        ({"keep": [0.5], "seeds": [2**64]}, ConfigError, r"seeds\[0\].*18446744073709551616"),
        ({"keep": [0.5], "seeds": [-1]}, ConfigError, "-1"),
        ({"first": -1}, ConfigError, "first.*-1"),
        ({"normalize": True}, ConfigError, "normalize.*'elect_sum' or 'elect_count'.*'sum'"),
        ({"unique": [1.0]}, ConfigError, "unique.*'mean_kept'"),
        ({"dominance": [1.0]}, ConfigError, "dominance.*'consensus'"),
        ({"combine": "consensus"}, ConfigError, "needs dominance"),
        ({"combine": "consensus", "dominance": [-1.0]}, ConfigError, r"dominance\[0\].*-1"),
        ({"combine": "consensus", "dominance": [1.0], "votes": 0}, ConfigError, "votes.*0"),
        ({"tie": 0}, ConfigError, "tie.*0"),
        ({"scaling": math.inf}, ConfigError, "scaling.*inf"),
        ({"out": torch.ones(5)}, ShapeMismatchError, r"out.*\(5,\)"),
        ({"out": ones.clone(), "out_dtype": BF16}, ConfigError, "bfloat16.*float32"),
        ({"out_dtype": torch.int32}, ConfigError, "int32"),
        ({"backend": "numpy"}, ConfigError, "numpy"),
    ],
)
def test_errors_name_the_values(options, error, match):
    with pytest.raises(error, match=match):
        blend(ones, options.pop("experts", [ones]), **options)


def test_every_rule_is_tested():
    assert {rule["combine"] for rule in RULES} == set(COMBINES)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("n", [0, 1, 1000, 200_003])
def test_sums_of_magnitudes_before_and_after_masking(backend, dtype, n):
    generator = torch.Generator().manual_seed(n)
    base, *experts = (torch.randn(n, generator=generator).to(dtype) for _ in range(3))
    options = {"lower": [0.5, None], "upper": [2.0, None], "keep": [None, 0.6], "seeds": [0, 9], "first": 77}
    found = magnitude_sums(base, experts, **options, backend=backend)
    zero = torch.zeros(n, dtype=F64 if dtype == F64 else torch.float32)
    for t, (whole, kept) in enumerate(found):
        d = experts[t].to(zero.dtype) - base.to(zero.dtype)
        own = {key: value if key == "first" else value[t : t + 1] for key, value in options.items()}
        left = blend(zero, [d], **own, backend="torch")
        assert whole == pytest.approx(float(d.double().abs().sum()), rel=1e-12)
        assert kept == pytest.approx(float(left.double().abs().sum()), rel=1e-12)
    if n:
        assert 0 <= found[0][1] <= found[0][0]
        for threads in (1, 2) if backend == "cpu" else ():  # the kernel's order is the same on any threads
            torch.set_num_threads(threads)
            assert magnitude_sums(base, experts, **options, backend=backend) == found
        experts[1][-1] = math.nan
        with pytest.raises(NonFiniteWeightError) as caught:
            magnitude_sums(base, experts, backend=backend)
        assert caught.value.index == 2

"""Every instruction set of the CPU kernels gives what the definition says, whatever the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch

from bmm_engine.ops import _native
from bmm_engine.ops.blend import cpu as blend_cpu
from bmm_engine.ops.blend import reference as blend_reference
from bmm_engine.ops.blend.rule import COMBINES, Part, Rule
from bmm_engine.ops.cross_gram import cpu as cross_gram_cpu
from bmm_engine.ops.gram import ACCUMULATE_DTYPES
from bmm_engine.ops.gram import cpu as gram_cpu
from bmm_engine.ops.residual import cpu as residual_cpu
from bmm_engine.ops.spectral import cpu as spectral_cpu
from tests.numerics import assert_as_good_as_torch

pytestmark = pytest.mark.skipif(_native.cpu_missing() is not None, reason=str(_native.cpu_missing()))

PAIRS = "avx512_bf16"
TRY_PAIRS = """
import torch
from bmm_engine.ops.gram import cpu
cpu.accumulate_gram(torch.zeros(3, 3), torch.ones(4, 3, dtype=torch.bfloat16), None, "ieee", "avx512_bf16")
"""


@cache
def runs_pairs() -> bool:
    """Whether the bf16 dot product runs here; some machines have it without saying so, others would kill the process."""
    return subprocess.run([sys.executable, "-c", TRY_PAIRS], capture_output=True, timeout=120).returncode == 0


@pytest.fixture(params=["portable", "avx2", "avx512", PAIRS])
def isa(request):
    if request.param == PAIRS and not runs_pairs():
        pytest.skip("this machine has no bf16 dot product")
    if request.param != PAIRS and request.param not in gram_cpu.isas():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


# in_x, in_y, rows: several blocks, panels that end anywhere, one chunk and several, odd depths
SHAPES = [(130, 515, 70), (49, 48, 1111), (1, 97, 1), (33, 1, 260), (16, 31, 513)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weights", ["none", "mask", "numbers"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_and_cross_gram(isa, dtype, weights, shape):
    m, n, rows = shape
    accumulate = ACCUMULATE_DTYPES[dtype]
    X, Y = torch.randn(rows, m).to(dtype), torch.randn(rows, n).to(dtype)
    w = {"none": None, "mask": (torch.rand(rows) > 0.4), "numbers": torch.rand(rows).mul(3).round() / 7}[weights]
    w = None if w is None else w.to(accumulate)
    some = torch.ones(rows) if w is None else w
    X[some == 0] = float("nan")  # must not be read
    kept = some != 0
    left, right, own = X[kept].double(), Y[kept].double(), some[kept, None].double()
    C, G = torch.randn(m, n, dtype=accumulate), torch.randn(n, n, dtype=accumulate)
    G = G + G.T
    truths = C.double() + (own * left).T @ right, G.double() + (own * right).T @ right
    same = (
        C + (own * left).to(accumulate).T @ right.to(accumulate),
        G + (own * right).to(accumulate).T @ right.to(accumulate),
    )
    alone = G.clone()
    cross_gram_cpu.accumulate_cross_gram(C, X, Y, w, G, "ieee", isa)
    assert_as_good_as_torch(C, same[0], truths[0])
    assert_as_good_as_torch(G, same[1], truths[1])
    assert torch.equal(G, G.T)
    gram_cpu.accumulate_gram(alone, Y, w, "ieee", isa)
    assert_as_good_as_torch(alone, same[1], truths[1])


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(130, 515), (7, 48), (1, 1), (300, 33)])
def test_residual(isa, out_dtype, weight_dtype, shape):
    out, width = shape
    anchor = torch.randn(out, width).to(weight_dtype)
    experts = [(anchor + 0.01 * torch.randn(out, width)).to(dtype) for dtype in (weight_dtype, torch.float32)]
    x = torch.randn(2 * width, width)
    grams = [(x.T @ x).to(out_dtype), torch.eye(width).mul(3).double()]
    R = torch.full((out, width), float("nan"), dtype=out_dtype)
    residual_cpu.residual(anchor, experts, grams, [0.25, 1.0], R, "ieee", isa)
    terms = [b * (e.double() - anchor.double()) @ g.double() for b, e, g in zip((0.25, 1.0), experts, grams)]
    same = sum(
        b * (e.to(out_dtype) - anchor.to(out_dtype)) @ g.to(out_dtype) for b, e, g in zip((0.25, 1.0), experts, grams)
    )
    assert_as_good_as_torch(R, same, sum(terms))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(130, 515), (7, 48), (1, 1), (300, 33)])
def test_spectral(isa, out_dtype, dtype, shape):
    out, width = shape
    anchor, base = torch.randn(out, width).to(out_dtype), torch.randn(out, width)
    projected, shrinkage = torch.randn(out, width, dtype=dtype), torch.rand(width, dtype=dtype)
    for q in (torch.randn(width, width, dtype=dtype), torch.randn(width, width, dtype=dtype).T):
        weight = torch.full((width, out), float("nan"), dtype=out_dtype).T  # a transposed parameter
        spectral_cpu.apply_spectral(weight, anchor, projected, shrinkage, q, base, 0.3, "ieee", isa)
        truth = 0.3 * anchor.double() + 0.7 * base.double() + (projected * shrinkage).double() @ q.double().T
        same = (0.3 * anchor.to(dtype) + 0.7 * base.to(dtype) + (projected * shrinkage) @ q.T).to(out_dtype)
        assert_as_good_as_torch(weight, same, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_is_rounded_to_16_bits_as_torch_does(isa, dtype):
    """Ties, carries into the exponent, subnormals, overflow: all float32 near every 16-bit value, and just between."""
    bits = torch.arange(0, 2**15, dtype=torch.int32)
    values = bits.to(torch.int16).view(dtype)
    values = values[values.isfinite()].float()
    middle = (values[:-1].double() + values[1:].double()).mul(0.5).float()
    special = torch.tensor([65504.0, 65519.9, 65520.0, 65536.0, 3.4e38, float("inf"), 1e-45, 2.98e-8, 2.981e-8])
    near = [torch.nextafter(middle, torch.tensor(v)) for v in (float("inf"), 0.0)]
    row = torch.cat([values, middle, *near, special])
    row = torch.cat([row, -row])[None]
    out = torch.empty(row.shape, dtype=dtype)
    width = row.shape[1]
    step = 512
    for start in range(0, width, step):  # B = 0: the anchor passes through the epilogue
        part = row[:, start : start + step]
        n = part.shape[1]
        zero, q = torch.zeros(1, n), torch.zeros(n, n)
        spectral_cpu.apply_spectral(out[:, start : start + step], part, zero, torch.ones(n), q, None, 1.0, "ieee", isa)
    assert torch.equal(out, row.to(dtype))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.float32] * 4,
        [torch.bfloat16] * 4,
        [torch.float16, torch.float32, torch.bfloat16, torch.float16],
        [torch.float64, torch.float16, torch.float32, torch.bfloat16],
    ],
)
def test_blend(isa, combine, dtypes):
    """Every instruction set has the very bits of plain torch, whatever a vector takes and leaves to the rest of a loop."""
    n = 1201
    base = torch.randn(n, dtype=torch.float64)
    inputs = [base, *(base + 0.1 * torch.randn(n, dtype=torch.float64) for _ in dtypes[1:])]
    base, *experts = (x.to(dtype) for x, dtype in zip(inputs, dtypes))
    ranks = torch.rand(n)
    numbers = [{"factor": 0.3, "weight": 0.3}, {"factor": -1.7, "weight": 2.0}, {"factor": 1.1, "weight": 0.1}]
    numbers = [{**each, "unique": 1.3, "dominance": 0.4} for each in numbers]
    bounds = {"lower": 0.0625, "upper": 0.25}
    masks = [[{}, {}, {}], [bounds, {}, {"lower": 0.1}], [{"keep": (0.5, 0.0), "seed": 2**64 - 3}, {**bounds}, {}]]
    masks.append([{"keep": (0.25, 0.5), "seed": 7, "ranks": ranks, **bounds}, {}, {"keep": (1.0, 0.0)}])
    for mask in masks:
        parts = tuple(Part(**own, **kept) for own, kept in zip(numbers, mask))
        rule = Rule(parts, combine, first=5, normalize=combine.startswith("elect"), scaling=0.77)
        for out_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            got, truth = (torch.full((n,), float("nan"), dtype=out_dtype) for _ in range(2))
            assert blend_reference.blend(base, experts, rule, truth) is None
            assert blend_cpu.blend(base, experts, rule, got, isa) is None
            assert torch.equal(got, truth)
        parts = tuple(replace(part, keep=None, ranks=None) for part in parts)
        balances = blend_reference.sign_balance(base, experts, parts), blend_cpu.sign_balance(base, experts, parts, isa)
        assert balances[0] == balances[1]


def test_blend_finds_what_is_not_finite(isa):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for index, where in ((0, 0), (1, 16), (2, 515), (2, 519)):
            tensors = [torch.full((520,), torch.finfo(dtype).max, dtype=dtype) for _ in range(3)]
            out, rule = torch.empty(520, dtype=dtype), Rule((Part(), Part(lower=0.5)))
            assert blend_cpu.blend(tensors[0], tensors[1:], rule, out, isa) is None
            for value in (float("nan"), float("inf"), -float("inf")):
                tensors[index][where] = value
                assert blend_cpu.blend(tensors[0], tensors[1:], rule, out, isa) == index


def test_bits_do_not_depend_on_threads(isa):
    X, Y = torch.randn(2300, 130), torch.randn(2300, 515)
    anchor, expert, gram = torch.randn(515, 300), torch.randn(515, 300), torch.randn(300, 300)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        C, G, R, W = torch.zeros(130, 515), torch.zeros(515, 515), torch.zeros(515, 300), torch.zeros(515, 300)
        cross_gram_cpu.accumulate_cross_gram(C, X, Y, torch.rand(2300, generator=torch.manual_seed(1)), G, "ieee", isa)
        residual_cpu.residual(anchor, [expert, expert], [gram, gram], [1.0, 0.3], R, "ieee", isa)
        spectral_cpu.apply_spectral(W, anchor, expert, torch.ones(300), gram, None, 1.0, "ieee", isa)
        results.append((C, G, R, W))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_calls_from_several_threads_at_once(isa):
    """The scratch memory and the team of threads are one call's own."""
    from concurrent.futures import ThreadPoolExecutor

    X = torch.randn(600, 200)
    expected = torch.zeros(200, 200)
    gram_cpu.accumulate_gram(expected, X, None, "ieee", isa)

    def work(_):
        G = torch.zeros(200, 200)
        gram_cpu.accumulate_gram(G, X, None, "ieee", isa)
        return torch.equal(G, expected)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(60)))


def test_without_openmp_the_kernels_bring_their_own_threads():
    """A process whose torch has no OpenMP runtime to share: the same bits."""
    code = """
import torch, ctypes, sys
from bmm_engine.ops.gram import cpu
torch.manual_seed(0)
X, G = torch.randn(700, 200), torch.zeros(200, 200)
torch.set_num_threads(2)
cpu.accumulate_gram(G, X, None, "ieee")
print(G.double().sum().item().hex())
"""
    sums = set()
    for environment in ({}, {"BMM_OWN_THREADS": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stderr
        sums.add(done.stdout)
    assert len(sums) == 1

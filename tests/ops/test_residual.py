from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import BackendError, ConfigError, ShapeMismatchError
from bmm_engine.ops import _native
from bmm_engine.ops.residual import residual
from tests.numerics import assert_as_good_as_torch, assert_as_precise
from tests.ops.backends import (
    INTERPRETED,
    device_of,
    each_backend,
    each_backend_and,
    each_gpu_backend,
    fill_late,
    needs_cpu,
    needs_two_devices,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

single, double, half, brain = torch.float32, torch.float64, torch.float16, torch.bfloat16
# anchor, experts, Grams, R
DTYPES = [
    (single, [single], [single], single),
    (brain, [brain, brain], [single, single], single),
    (half, [half, single, brain], [single, single, double], single),
    (double, [brain, double], [single, double], single),
    (double, [double, single], [double, single], double),
    (brain, [brain], [single], double),
]
SHAPES = [(64, 64), (70, 133), (1, 1), (5, 1), (3, 40), (3, 20, 33), (2, 2, 7, 5)]
TRITON_SHAPES = (
    [(32, 32), (40, 70), (1, 1), (5, 1), (3, 20, 17), (2, 2, 7, 5)] if INTERPRETED else [*SHAPES, (700, 530)]
)

each = each_backend("torch", "cpu", "cuda", "triton")
each_shape = each_backend_and("shape", {"torch": SHAPES, "cpu": SHAPES, "cuda": TRITON_SHAPES, "triton": TRITON_SHAPES})


def problem(shape, dtypes, device="cpu"):
    """anchor, experts, Grams (symmetric), weights."""
    of_anchor, of_experts, of_grams, _ = dtypes
    anchor = torch.randn(shape)
    experts = [(anchor + 0.3 * torch.randn(shape)).to(dtype).to(device) for dtype in of_experts]
    square = (*shape[:-2], shape[-1], shape[-1])
    grams = [torch.randn(square, dtype=torch.float64) for _ in of_grams]
    grams = [(gram @ gram.mT).to(dtype).to(device) for gram, dtype in zip(grams, of_grams)]
    return anchor.to(of_anchor).to(device), experts, grams, torch.rand(len(experts)).add(0.1).tolist()


def definition(anchor, experts, grams, weights):
    terms = zip(experts, grams, weights)
    return sum(beta * (expert.double() - anchor.double()) @ gram.double() for expert, gram, beta in terms)


@each_shape
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_equals_the_definition(backend, dtypes, shape):
    if backend == "triton" and dtypes[-1] == torch.float64:
        return  # see test_float64_is_not_for_triton
    call = problem(shape, dtypes, device_of(backend))
    result = residual(*call, out_dtype=dtypes[-1], backend=backend)
    same_dtype = residual(*call, out_dtype=dtypes[-1], backend="torch")
    assert result.dtype == dtypes[-1]
    assert_as_good_as_torch(result, same_dtype, definition(*call))


def test_torch_forms_the_difference_in_the_dtype_of_the_sum():
    anchor, expert = torch.tensor([[1.0]], dtype=brain), torch.tensor([[1.0 + 2**-20]])
    assert residual(anchor, [expert], [torch.ones(1, 1)], [1]).item() == 2**-20


@each
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_precision(backend, precision):
    shape = (20, 70) if backend == "triton" and INTERPRETED else (150, 200)
    anchor, experts, grams, weights = problem(shape, DTYPES[1], device_of(backend))
    same_dtype = residual(anchor, experts, grams, weights, backend="torch")
    moved = [expert.double() - anchor.double() for expert in experts]
    magnitude = sum(beta * delta.abs() @ gram.double().abs() for delta, gram, beta in zip(moved, grams, weights))
    result = residual(anchor, experts, grams, weights, precision=precision, backend=backend)
    assert_as_precise(result, same_dtype, definition(anchor, experts, grams, weights), magnitude, precision)


def strided(device):
    """A problem of which no tensor is contiguous; the Grams of the first two experts differ in their layout."""
    anchor = torch.randn(40, 30, device=device).T  # (30, 40)
    experts = [torch.randn(30, 80, device=device)[:, ::2], torch.randn(60, 41, device=device)[::2, 1:]]
    gram = torch.randn(40, 40, device=device)
    gram = gram + gram.T
    grams = [gram.repeat_interleave(2, dim=1)[:, ::2], torch.cat([gram, gram])[:40].T]
    return anchor, experts, grams, [0.5, 2.0]


@each
def test_inputs_may_have_any_strides(backend):
    call = strided(device_of(backend))
    if backend == "cuda":
        with pytest.raises(BackendError, match="gaps"):
            residual(*call, backend=backend)
        backend = "auto"
    assert_as_good_as_torch(residual(*call, backend=backend), residual(*call, backend="torch"), definition(*call))


@each
def test_out_may_have_any_strides(backend):
    call = strided(device_of(backend))
    out = torch.empty(40, 60, device=device_of(backend))[:, ::2].T
    if backend in ("cpu", "cuda"):
        with pytest.raises(BackendError, match="gaps"):
            residual(*call, out=out, backend=backend)
        backend = "auto"
    assert residual(*call, out=out, backend=backend) is out
    assert_as_good_as_torch(out, residual(*call, backend="torch"), definition(*call))


@each
def test_out_decides_the_dtype(backend):
    call = problem((6, 5), DTYPES[0], device_of(backend))
    out = torch.empty(6, 5, device=call[0].device)
    assert residual(*call, out=out, backend=backend) is out
    torch.testing.assert_close(out.double(), definition(*call), rtol=1e-5, atol=1e-5)


def test_the_widest_input_sets_the_dtype():
    narrow, wide = torch.zeros(2, 2, dtype=half), torch.zeros(2, 2, dtype=double)
    gram = torch.zeros(2, 2)
    assert residual(narrow, [narrow], [gram], [1]).dtype == single
    assert residual(narrow, [narrow], [wide], [1]).dtype == double
    assert residual(narrow, [wide], [gram], [1]).dtype == double
    assert residual(wide, [narrow], [gram], [1]).dtype == double


@each
def test_experts_equal_to_the_anchor_give_exactly_zero(backend):
    anchor, _, grams, weights = problem((9, 20), DTYPES[1], device_of(backend))
    assert not residual(anchor, [anchor, anchor.clone()], grams, weights, backend=backend).any()


@each
def test_what_belongs_to_a_weight_of_zero_is_not_read(backend):
    anchor, experts, grams, _ = problem((9, 20), DTYPES[1], device_of(backend))
    expected = residual(anchor, experts[:1], grams[:1], [0.5], backend=backend)
    experts[1], grams[1] = torch.full_like(experts[1], math.nan), torch.full_like(grams[1], math.nan)
    assert torch.equal(residual(anchor, experts, grams, [0.5, 0], backend=backend), expected)
    assert not residual(anchor, experts, grams, [0, 0], backend=backend).any()


@each
@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 4), (0, 0)])
def test_empty(backend, shape):
    call = problem(shape, DTYPES[0], device_of(backend))
    assert residual(*call, backend=backend).shape == shape


@needs_cpu
@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[4]], ids=str)
def test_bits_do_not_depend_on_threads(dtypes):
    call, results = problem((150, 170), dtypes), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(residual(*call, backend="cpu"))
    assert all(torch.equal(results[0], other) for other in results[1:])


@each_backend("triton")
def test_float64_is_not_for_triton(backend):
    call = problem((3, 4), DTYPES[-1], device_of(backend))
    with pytest.raises(BackendError, match="float64"):
        residual(*call, out_dtype=double, backend=backend)
    residual(*call, out_dtype=double)  # auto finds another


@given(
    rows=st.integers(1, 20),
    n=st.integers(1, 20),
    count=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    backend=st.sampled_from(["torch", "cpu"] if _native.cpu_missing() is None else ["torch"]),
)
def test_laws(rows, n, count, seed, backend):
    torch.manual_seed(seed)
    anchor, experts, grams, weights = problem((rows, n), (double, [double] * count, [double] * count, double))

    def r(*call):
        return residual(*call, backend=backend)

    result = r(anchor, experts, grams, weights)
    close = {"rtol": 1e-10, "atol": 1e-10 * (1 + result.abs().max().item())}
    torch.testing.assert_close(r(anchor, experts[::-1], grams[::-1], weights[::-1]), result, **close)
    assert torch.equal(r(anchor, experts, grams, [2 * beta for beta in weights]), 2 * result)
    parts = [r(anchor, [e], [g], [b]) for e, g, b in zip(experts, grams, weights)]
    torch.testing.assert_close(sum(parts), result, **close)
    torch.testing.assert_close(r(anchor + 1, [e + 1 for e in experts], grams, weights), result, **close)
    blocks = [r(anchor[i : i + 7], [e[i : i + 7] for e in experts], grams, weights) for i in range(0, rows, 7)]
    torch.testing.assert_close(torch.cat(blocks), result, **close)


W, gram = torch.zeros(2, 3), torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: residual(W, [], [], []), ConfigError, "at least one"),
        (lambda: residual(W, [W], [gram], [1, 2]), ShapeMismatchError, "1 experts, 1 Grams and 2 weights"),
        (lambda: residual(W, [W, W], [gram], [1, 2]), ShapeMismatchError, "2 experts, 1 Grams and 2 weights"),
        (lambda: residual(W[0], [W[0]], [gram], [1]), ShapeMismatchError, r"\(3,\)"),
        (lambda: residual(W, [W.T], [gram], [1]), ShapeMismatchError, r"experts\[0\].*\(3, 2\)"),
        (lambda: residual(W, [W], [torch.zeros(2, 2)], [1]), ShapeMismatchError, r"grams\[0\].*\(2, 2\)"),
        (lambda: residual(W[None], [W[None]], [gram], [1]), ShapeMismatchError, r"grams\[0\] must be \(1, 3, 3\)"),
        (lambda: residual(W, [W], [gram], [1], out=gram), ShapeMismatchError, r"out must be \(2, 3\)"),
        (lambda: residual(W.int(), [W], [gram], [1]), ConfigError, "anchor.*int32"),
        (lambda: residual(W, [W.int()], [gram], [1]), ConfigError, r"experts\[0\].*int32"),
        (lambda: residual(W, [W], [gram.half()], [1]), ConfigError, r"grams\[0\].*float16"),
        (lambda: residual(W, [W], [gram], [1], out=W.half()), ConfigError, "out.*float16"),
        (lambda: residual(W, [W], [gram], [1], out_dtype=half), ConfigError, "out_dtype.*float16"),
        (lambda: residual(W, [W], [gram], [1], out=W.clone(), out_dtype=double), ConfigError, "give one"),
        (lambda: residual(W, [W.to("meta")], [gram], [1]), ConfigError, "meta"),
        (lambda: residual(W, [W], [gram], [-1]), ConfigError, r"weights\[0\].*-1"),
        (lambda: residual(W, [W], [gram], [math.inf]), ConfigError, "inf"),
        (lambda: residual(W, [W], [gram], [1], precision="x"), ConfigError, "'x'"),
    ],
)
def test_errors_name_the_values(call, error, match):
    with pytest.raises(error, match=match):
        call()


@each_gpu_backend("cuda", "triton")
def test_work_on_a_side_stream_is_in_its_order(backend):
    anchor, experts, grams, weights = problem((100, 64), DTYPES[0], "cuda")
    expected, late, stream = definition(anchor, experts, grams, weights), torch.zeros_like(anchor), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        fill_late(late, anchor)
        result = residual(late, experts, grams, weights, backend=backend)
    stream.synchronize()
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@needs_two_devices
@each_gpu_backend("cuda", "triton")
def test_on_a_device_that_is_not_the_current(backend):
    call = problem((20, 30), DTYPES[0], "cuda:1")
    with torch.cuda.device(0):
        result = residual(*call, backend=backend)
    torch.testing.assert_close(result.double(), definition(*call), rtol=1e-4, atol=1e-4)

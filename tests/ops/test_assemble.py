from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import BackendError, ConfigError, ShapeMismatchError
from bmm_engine.ops import _native
from bmm_engine.ops.assemble import assemble
from tests.numerics import assert_as_good_as_torch

pytestmark = pytest.mark.usefixtures("poisoned_empty")

needs_cpu = pytest.mark.skipif(_native.cpu_missing() is not None, reason=str(_native.cpu_missing()))
each_backend = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("cpu", marks=needs_cpu), pytest.param("cuda", marks=pytest.mark.gpu)]
)
SHAPES = [(64, 64), (131, 131), (1, 1), (3, 40, 40), (2, 2, 7, 7), (400, 400)]


def grams_of(shape, dtypes, device="cpu"):
    grams = [torch.randn(shape, dtype=torch.float64) for _ in dtypes]
    return [(g @ g.mT).to(dtype).to(device) for g, dtype in zip(grams, dtypes, strict=True)]


def definition(grams, weights, ridge):
    total = sum(weight * gram.double() for gram, weight in zip(grams, weights, strict=True))
    return total + ridge * torch.eye(total.shape[-1], dtype=torch.float64, device=total.device)


def device_of(backend):
    return "cuda" if backend == "cuda" else "cpu"


@each_backend
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_dtypes", [[torch.float32], [torch.float64] * 2, [torch.float32, torch.float64] * 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(backend, out_dtype, in_dtypes, shape):
    grams = grams_of(shape, in_dtypes, device_of(backend))
    weights = torch.rand(len(grams)).tolist()
    result = assemble(grams, weights, 0.37, out_dtype=out_dtype, backend=backend)
    same_dtype = assemble(grams, weights, 0.37, out_dtype=out_dtype, backend="torch")
    assert_as_good_as_torch(result, same_dtype, definition(grams, weights, 0.37))


@each_backend
def test_more_grams_than_one_pass_takes(backend):
    grams = grams_of((33, 33), [torch.float32] * 70, device_of(backend))
    weights = torch.rand(70).tolist()
    result = assemble(grams, weights, 2.0, backend=backend)
    same_dtype = assemble(grams, weights, 2.0, backend="torch")
    assert_as_good_as_torch(result, same_dtype, definition(grams, weights, 2.0))


@each_backend
def test_out_may_be_one_of_the_grams(backend):
    grams = grams_of((50, 50), [torch.float32] * 3, device_of(backend))
    expected = definition(grams, [1, 2, 3], 0.5)
    result = assemble(grams, [1, 2, 3], 0.5, out=grams[1], backend=backend)
    assert result is grams[1]
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-4)


@each_backend
def test_the_widest_gram_sets_the_dtype(backend):
    narrow, wide = grams_of((4, 4), [torch.float32, torch.float64], device_of(backend))
    assert assemble([narrow, narrow], [1, 1], 1, backend=backend).dtype == torch.float32
    assert assemble([narrow, wide], [1, 1], 1, backend=backend).dtype == torch.float64


@each_backend
def test_a_weight_of_zero_and_no_ridge(backend):
    first, second = grams_of((20, 20), [torch.float32] * 2, device_of(backend))
    assert torch.equal(assemble([first, second], [1, 0], 0, backend=backend), first)


@each_backend
@pytest.mark.parametrize("shape", [(0, 0), (0, 5, 5)])
def test_empty(backend, shape):
    gram = torch.zeros(shape, device=device_of(backend))
    assert assemble([gram], [1], 1, backend=backend).shape == shape


@needs_cpu
def test_bits_do_not_depend_on_threads():
    grams, results = grams_of((515, 515), [torch.float32] * 5), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(assemble(grams, [0.1, 0.2, 0.3, 0.4, 0.5], 1e-3, backend="cpu"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strided_grams_go_to_torch():
    gram = torch.randn(8, 16)[:, ::2]
    torch.testing.assert_close(assemble([gram], [2], 0), 2 * gram)
    with pytest.raises(BackendError, match=r"contiguous|not built"):
        assemble([gram], [2], 0, backend="cpu")


@given(n=st.integers(1, 40), count=st.integers(1, 5), ridge=st.floats(0, 10), seed=st.integers(0, 2**31))
def test_laws(n, count, ridge, seed):
    torch.manual_seed(seed)
    grams, weights = grams_of((n, n), [torch.float64] * count), torch.rand(count).tolist()
    result = assemble(grams, weights, ridge)
    close = {"rtol": 1e-12, "atol": 1e-12 * result.abs().max().item() + 1e-300}
    torch.testing.assert_close(result, result.mT, **close)
    torch.testing.assert_close(assemble(grams[::-1], weights[::-1], ridge), result, **close)
    doubled = assemble(grams, [2 * weight for weight in weights], 2 * ridge)
    assert torch.equal(doubled, 2 * result)


square = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: assemble([], [], 1), ConfigError, "at least one"),
        (lambda: assemble([square], [1, 2], 1), ShapeMismatchError, "1 Grams, but 2 weights"),
        (lambda: assemble([torch.zeros(3, 4)], [1], 1), ShapeMismatchError, r"\(3, 4\)"),
        (lambda: assemble([torch.zeros(3)], [1], 1), ShapeMismatchError, r"\(3,\)"),
        (lambda: assemble([square, torch.zeros(4, 4)], [1, 1], 1), ShapeMismatchError, r"grams\[1\] is \(4, 4\)"),
        (lambda: assemble([square], [1], 1, out=torch.zeros(2, 2)), ShapeMismatchError, r"out is \(2, 2\)"),
        (lambda: assemble([square.half()], [1], 1), ConfigError, "float16"),
        (lambda: assemble([square], [1], 1, out_dtype=torch.bfloat16), ConfigError, "bfloat16"),
        (lambda: assemble([square], [1], 1, out=square.clone(), out_dtype=torch.float64), ConfigError, "give one"),
        (lambda: assemble([square, square.to("meta")], [1, 1], 1), ConfigError, "meta"),
        (lambda: assemble([square], [-1], 1), ConfigError, r"weights\[0\].*-1"),
        (lambda: assemble([square], [math.nan], 1), ConfigError, "nan"),
        (lambda: assemble([square], [1], math.inf), ConfigError, "ridge.*inf"),
        (lambda: assemble([square], [1], -0.5), ConfigError, "ridge.*-0.5"),
    ],
)
def test_errors_name_the_values(call, error, match):
    with pytest.raises(error, match=match):
        call()

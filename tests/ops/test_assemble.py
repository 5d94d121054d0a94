from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import BackendError, ConfigError, ShapeMismatchError
from bmm_engine.ops.assemble import assemble
from tests.numerics import assert_as_good_as_torch
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

SHAPES = [(64, 64), (131, 131), (1, 1), (3, 40, 40), (2, 2, 7, 7), (260, 260)]
TRITON_SHAPES = [(32, 32), (67, 67), (1, 1), (3, 20, 20), (2, 2, 7, 7)] if INTERPRETED else [*SHAPES, (2, 1500, 1500)]

each = each_backend("torch", "cpu", "cuda", "triton")
each_shape = each_backend_and("shape", {"torch": SHAPES, "cpu": SHAPES, "cuda": SHAPES, "triton": TRITON_SHAPES})


def grams_of(shape, dtypes, device="cpu"):
    grams = [torch.randn(shape, dtype=torch.float64) for _ in dtypes]
    return [(g @ g.mT).to(dtype).to(device) for g, dtype in zip(grams, dtypes, strict=True)]


def definition(grams, weights, ridge, shrink=1.0):
    total = sum(weight * gram.double() for gram, weight in zip(grams, weights, strict=True))
    identity = torch.eye(total.shape[-1], dtype=torch.float64, device=total.device)
    ridge = torch.as_tensor(ridge, dtype=torch.float64, device=total.device)
    ridge = ridge.reshape(*total.shape[:-2], 1, 1) if ridge.ndim else ridge
    return total * (shrink + (1 - shrink) * identity) + ridge * identity


@each_shape
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_dtypes", [[torch.float32], [torch.float64] * 2, [torch.float32, torch.float64] * 2])
def test_equals_the_definition(backend, out_dtype, in_dtypes, shape):
    grams = grams_of(shape, in_dtypes, device_of(backend))
    weights = torch.rand(len(grams)).tolist()
    result = assemble(grams, weights, 0.37, out_dtype=out_dtype, backend=backend)
    same_dtype = assemble(grams, weights, 0.37, out_dtype=out_dtype, backend="torch")
    assert_as_good_as_torch(result, same_dtype, definition(grams, weights, 0.37))


@each_shape
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shrink", [0.0, 0.75, 1.0])
def test_shrinking_and_a_ridge_for_each_member(backend, out_dtype, shrink, shape):
    grams, weights = grams_of(shape, [torch.float32] * 2, device_of(backend)), [0.5, 2.0]
    ridges = (torch.rand(math.prod(shape[:-2])) * 50).tolist() if len(shape) > 2 else 0.5
    result = assemble(grams, weights, ridges, shrink=shrink, out_dtype=out_dtype, backend=backend)
    same_dtype = assemble(grams, weights, ridges, shrink=shrink, out_dtype=out_dtype, backend="torch")
    assert_as_good_as_torch(result, same_dtype, definition(grams, weights, ridges, shrink))


@each
def test_ridges_may_come_as_a_tensor(backend):
    grams, ridges = grams_of((3, 5, 5), [torch.float32], device_of(backend)), [1.0, 2.0, 3.0]
    expected = assemble(grams, [1], ridges, backend=backend)
    for given_ridges in (torch.tensor(ridges), torch.tensor(ridges).to(grams[0].device), tuple(ridges)):
        assert torch.equal(assemble(grams, [1], given_ridges, backend=backend), expected)
    assert torch.equal(assemble(grams, [1], torch.tensor(2.0), backend=backend)[1], expected[1])


@each
def test_shrink_leaves_the_diagonal_exactly(backend):
    (gram,) = grams_of((20, 20), [torch.float32], device_of(backend))
    assert torch.equal(assemble([gram], [1], 0, shrink=0, backend=backend), gram.diagonal().diag())
    assert torch.equal(assemble([gram], [1], 0, shrink=0.5, backend=backend).diagonal(), gram.diagonal())


@each
def test_more_grams_than_one_pass_takes(backend):
    grams = grams_of((17, 17), [torch.float32] * 70, device_of(backend))
    weights = torch.rand(70).tolist()
    result = assemble(grams, weights, 2.0, backend=backend)
    same_dtype = assemble(grams, weights, 2.0, backend="torch")
    assert_as_good_as_torch(result, same_dtype, definition(grams, weights, 2.0))


@each
def test_out_may_be_one_of_the_grams(backend):
    grams = grams_of((50, 50), [torch.float32] * 3, device_of(backend))
    expected = definition(grams, [1, 2, 3], 0.5)
    result = assemble(grams, [1, 2, 3], 0.5, out=grams[1], backend=backend)
    assert result is grams[1]
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-4)


@each
def test_the_widest_gram_sets_the_dtype(backend):
    narrow, wide = grams_of((4, 4), [torch.float32, torch.float64], device_of(backend))
    assert assemble([narrow, narrow], [1, 1], 1, backend=backend).dtype == torch.float32
    assert assemble([narrow, wide], [1, 1], 1, backend=backend).dtype == torch.float64


@each
def test_a_weight_of_zero_and_no_ridge(backend):
    first, second = grams_of((20, 20), [torch.float32] * 2, device_of(backend))
    assert torch.equal(assemble([first, second], [1, 0], 0, backend=backend), first)


@each
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
        (lambda: assemble([square], [1], [1, 2]), ShapeMismatchError, r"2 ridges for 1 members of \(3, 3\)"),
        (lambda: assemble([square.repeat(3, 1, 1)], [1], [1]), ShapeMismatchError, "1 ridges for 3 members"),
        (lambda: assemble([square.repeat(2, 1, 1)], [1], [1, -2]), ConfigError, "ridge.*-2"),
        (lambda: assemble([square], [1], 1, shrink=1.5), ConfigError, r"shrink must be in \[0, 1\], and is 1.5"),
        (lambda: assemble([square], [1], 1, shrink=math.nan), ConfigError, "shrink.*nan"),
    ],
)
def test_errors_name_the_values(call, error, match):
    with pytest.raises(error, match=match):
        call()


@each_gpu_backend("cuda", "triton")
def test_work_on_a_side_stream_is_in_its_order(backend):
    (gram,), stream = grams_of((300, 300), [torch.float32], "cuda"), torch.cuda.Stream()
    late = torch.zeros_like(gram)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        fill_late(late, gram)
        result = assemble([late, late], [1, 2], 0.5, backend=backend)
    stream.synchronize()
    torch.testing.assert_close(result.double(), definition([gram], [3], 0.5), rtol=1e-5, atol=1e-3)


@needs_two_devices
@each_gpu_backend("cuda", "triton")
def test_on_a_device_that_is_not_the_current(backend):
    grams = grams_of((30, 30), [torch.float32], "cuda:1")
    with torch.cuda.device(0):
        result = assemble(grams, [2], 0.5, backend=backend)
    torch.testing.assert_close(result.double(), definition(grams, [2], 0.5), rtol=1e-5, atol=1e-4)


@each_gpu_backend("triton")
def test_tables_of_dead_tensors_do_not_come_back(backend):
    for _ in range(300):  # more than are kept; addresses come again with other contents
        (gram,) = grams_of((8, 8), [torch.float32], "cuda")
        assert torch.equal(assemble([gram], [1], 0, backend=backend), gram)

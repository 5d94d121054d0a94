from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import BackendError, ConfigError, NonFiniteWeightError, ShapeMismatchError
from bmm_engine.ops.ranks import magnitude_ranks
from tests.ops.backends import each_backend, needs_cpu

pytestmark = pytest.mark.usefixtures("poisoned_empty")

each = each_backend("torch", "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One entry, one column, one row, spans that end anywhere, both widths of digits.
SHAPES = [(1,), (5, 1), (0, 7), (7, 0), (3, 2), (1001,), (40, 513), (3, 2999), (2, 3000), (20_011,)]


def definition(x, minus=None):
    """By Python's sort, which is stable, of float32 magnitudes."""
    wide = np.float64 if torch.float64 in (x.dtype, x.dtype if minus is None else minus.dtype) else np.float32
    difference = x.double().numpy().astype(wide)
    if minus is not None:
        difference = difference - minus.double().numpy().astype(wide)
    rows = np.abs(difference).astype(np.float32)
    ranks = np.ones(rows.shape, dtype=np.float32)
    n = rows.shape[-1]
    for values, row in zip(rows.reshape(-1, n), ranks.reshape(-1, n)) if n > 1 else ():
        for rank, j in enumerate(sorted(range(n), key=values.tolist().__getitem__)):
            row[j] = np.float32(rank / (n - 1))
    return torch.from_numpy(ranks)


def values_of(shape, dtype):
    """Magnitudes over many binades with zeros of both signs, repeated values and infinities."""
    n = torch.Size(shape).numel()
    x = torch.randn(n, dtype=torch.float64) * torch.logspace(-9, 9, n, dtype=torch.float64)
    x[torch.rand(n) < 0.1] = 0
    x[torch.rand(n) < 0.1] = -0.0
    x[torch.rand(n) < 0.1] = -0.37
    x[torch.rand(n) < 0.01] = math.inf
    return x[torch.randperm(n)].reshape(shape).to(dtype)


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_sort(backend, dtype, shape):
    x = values_of(shape, dtype)
    ranks = magnitude_ranks(x, backend=backend)
    assert ranks.dtype == torch.float32
    assert torch.equal(ranks, definition(x))


@each
@pytest.mark.parametrize("minus_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (40, 513), (2, 4100)])
def test_of_a_difference(backend, dtype, minus_dtype, shape):
    minus = torch.randn(shape).to(minus_dtype)
    x = (minus.double() + 0.01 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    assert torch.equal(magnitude_ranks(x, minus, backend=backend), definition(x, minus))


@each
@pytest.mark.parametrize("n", [2, 100, 5000])
def test_rows_with_few_values(backend, n):
    """All alike, two values that differ in one digit only, and in others."""
    rows = [torch.full((n,), 3.0), torch.zeros(n)]
    rows += [torch.where(torch.rand(n) < 0.5, 1.0, other) for other in (1 + 2**-23, 1.5, 2.0, 0.0, 1e30, -1.0)]
    x = torch.stack(rows)
    ranks = magnitude_ranks(x, backend=backend)
    assert torch.equal(ranks, definition(x))
    assert torch.equal(ranks[0], torch.arange(n, dtype=torch.float64).div(n - 1).float())


@given(bits=st.lists(st.integers(0, 2**32 - 1).filter(lambda b: b & 0x7FFFFFFF <= 0x7F800000), min_size=1, max_size=50))
def test_any_bits_but_those_of_nan(bits):
    x = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))
    assert torch.equal(magnitude_ranks(x), definition(x))


@needs_cpu
@pytest.mark.parametrize("shape", [(64, 1000), (5, 6000), (30_001,)])
def test_bits_do_not_depend_on_threads(shape):
    x = values_of(shape, torch.float32)
    expected = magnitude_ranks(x, backend="torch")
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(magnitude_ranks(x, backend="cpu"), expected)


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [30, 4000])
def test_nan_is_an_error_and_counted(backend, dtype, n):
    x = torch.ones(3, n, dtype=dtype)
    x[0, 0] = x[2, n - 1] = math.nan
    with pytest.raises(NonFiniteWeightError, match=f"2 of {3 * n}"):
        magnitude_ranks(x, backend=backend)
    infinite = torch.full((2, n), -math.inf, dtype=dtype)
    with pytest.raises(NonFiniteWeightError, match=f"{2 * n} of {2 * n}"):
        magnitude_ranks(infinite, infinite, backend=backend)


@each
def test_strides(backend):
    x, minus = torch.randn(20, 30), torch.randn(30, 20).T
    if backend == "cpu":
        with pytest.raises(BackendError, match="not contiguous"):
            magnitude_ranks(x, minus, backend=backend)
    assert torch.equal(magnitude_ranks(x, minus), definition(x, minus))


def test_takes_arrays_of_other_libraries():
    x = np.array([3.0, -4.0, 0.0], dtype=np.float32)
    assert magnitude_ranks(x, np.zeros(3)).tolist() == [0.5, 1.0, 0.0]


@each_backend("torch")
@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(backend):
    x, minus = values_of((40, 5000), torch.float32).clamp(max=1e6), torch.randn(40, 5000).bfloat16()
    ranks = magnitude_ranks(x.to("cuda"), minus.to("cuda"), backend=backend)
    assert torch.equal(ranks.cpu(), magnitude_ranks(x, minus, backend=backend))


ones = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: magnitude_ranks(torch.ones(())), ShapeMismatchError, r"\(rows, n\).*\(\)"),
        (lambda: magnitude_ranks(torch.ones(2, 3, 4)), ShapeMismatchError, r"\(2, 3, 4\)"),
        (lambda: magnitude_ranks(ones, ones[:1]), ShapeMismatchError, r"minus.*\(1, 4\).*\(2, 4\)"),
        (lambda: magnitude_ranks(ones.int()), ConfigError, "x must.*int32"),
        (lambda: magnitude_ranks(ones, ones.int()), ConfigError, "minus must.*int32"),
        (lambda: magnitude_ranks(ones, ones.to("meta")), ConfigError, "minus is on meta"),
        (lambda: magnitude_ranks(ones, backend="sort"), ConfigError, "sort"),
    ],
)
def test_errors_name_the_values(call, error, match):
    with pytest.raises(error, match=match):
        call()

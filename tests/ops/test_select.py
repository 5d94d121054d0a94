from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import BackendError, ConfigError, NonFiniteWeightError, ShapeMismatchError
from bmm_engine.ops import select
from bmm_engine.ops.select import (
    LOWER_BINS,
    UPPER_BINS,
    add_magnitude_histogram,
    find_rank,
    kth_largest_magnitude,
)
from tests.ops.backends import device_of, each_backend, each_gpu_backend, fill_late

each = each_backend("torch", "cpu", "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One entry, fewer than a vector, ragged, several dimensions, more than one block of threads takes.
SHAPES = [(1,), (), (3,), (7, 13), (2, 3, 5, 7), (1001,), (300, 501)]


def values_of(shape, dtype):
    """Magnitudes over many binades, with many zeros of both signs, repeated values and infinities."""
    n = torch.Size(shape).numel()
    x = torch.randn(n, dtype=torch.float64) * torch.logspace(-9, 9, n, dtype=torch.float64)
    x[torch.rand(n) < 0.3] = 0
    x[torch.rand(n) < 0.1] = -0.0
    x[torch.rand(n) < 0.2] = 0.37
    x[torch.rand(n) < 0.01] = -math.inf
    return x[torch.randperm(n)].reshape(shape).to(dtype)


def definition(x, upper):
    """By NumPy, on the bits."""
    bits = np.abs(x.detach().cpu().float().numpy()).reshape(-1).view(np.uint32).astype(np.int64)
    keys, bins = (bits >> 16, UPPER_BINS) if upper is None else ((bits & 0xFFFF)[bits >> 16 == upper], LOWER_BINS)
    return torch.from_numpy(np.bincount(keys, minlength=bins))


def histogram(x, upper, backend):
    bins = UPPER_BINS if upper is None else LOWER_BINS
    return add_magnitude_histogram(torch.zeros(bins, dtype=torch.int64, device=x.device), x, upper, backend=backend)


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_histograms_equal_the_definition(backend, dtype, shape):
    x = values_of(shape, dtype).to(device_of(backend))
    counts = histogram(x, None, backend)
    assert torch.equal(counts.cpu(), definition(x, None))
    fullest = int(counts[1:].argmax()) + 1
    for upper in (0, fullest, 0x7F80, UPPER_BINS - 1):
        assert torch.equal(histogram(x, upper, backend).cpu(), definition(x, upper))


@each_backend("torch", "cpu")
@pytest.mark.parametrize("minus_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70_001,), (0, 3)])
def test_histograms_of_a_difference(backend, dtype, minus_dtype, shape):
    x, minus = torch.randn(shape).to(dtype), torch.randn(shape).to(minus_dtype)
    x.view(-1)[::3] = minus.view(-1)[::3].to(dtype)  # differences of 0, or of a rounding error
    wide = np.float64 if torch.float64 in (dtype, minus_dtype) else np.float32
    a, b = (tensor.double().numpy().astype(wide) for tensor in (x, minus))
    difference = torch.from_numpy(np.asarray(a - b))
    for upper in (None, 0, int(definition(difference, None)[1:].argmax()) + 1):
        counts = torch.ones(UPPER_BINS if upper is None else LOWER_BINS, dtype=torch.int64)
        assert add_magnitude_histogram(counts, x, upper, backend, minus=minus) is counts
        assert torch.equal(counts - 1, definition(difference, upper))


@each_backend("torch", "cpu")
def test_a_difference_of_any_strides(backend):
    x, minus = torch.randn(30, 20), torch.randn(20, 30).T
    counts = add_magnitude_histogram(
        torch.zeros(UPPER_BINS, dtype=torch.int64), x, None, "auto" if backend == "cpu" else backend, minus=minus
    )
    assert torch.equal(counts, definition(x - minus, None))


def test_cuda_says_that_it_takes_no_difference(monkeypatch):
    monkeypatch.setattr(select.cuda._native, "cuda_missing", lambda: None)
    with pytest.raises(BackendError, match="not those of a difference"):
        add_magnitude_histogram(bins.clone(), ones, None, "cuda", minus=ones)


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_add_up_over_slices_that_begin_anywhere(backend, dtype):
    x = values_of((500,), dtype).to(device_of(backend))
    for upper in (None, 0):
        whole = histogram(x, upper, backend)
        parts = torch.zeros_like(whole)
        for part in x.split([1, 2, 3, 5, 100, 389]):
            assert add_magnitude_histogram(parts, part, upper, backend=backend) is parts
        assert torch.equal(parts, whole)


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kth_largest_equals_a_sort(backend, dtype, shape):
    x = values_of(shape, dtype).to(device_of(backend))
    ordered = x.abs().float().flatten().sort(descending=True).values.tolist()
    for k in {1, 2, len(ordered) // 3, len(ordered) // 2, len(ordered) - 1, len(ordered)}:
        if 1 <= k <= len(ordered):
            assert kth_largest_magnitude(x, k, backend=backend) == ordered[k - 1]


@given(
    bits=st.lists(st.integers(0, 2**32 - 1).filter(lambda b: b & 0x7FFFFFFF <= 0x7F800000), min_size=1, max_size=50),
    data=st.data(),
)
def test_any_bits_but_those_of_nan(bits, data):
    x = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))
    k = data.draw(st.integers(1, len(bits)))
    assert kth_largest_magnitude(x, k) == x.abs().sort(descending=True).values[k - 1].item()


@each
def test_float64_is_ordered_as_float32(backend):
    x = torch.tensor([1.0, 1.0 + 2**-30, 1e300, -1e-300], dtype=torch.float64, device=device_of(backend))
    found = [kth_largest_magnitude(x, k, backend=backend) for k in (1, 2, 3, 4)]
    assert found == [math.inf, 1.0, 1.0, 0.0]


@each
@pytest.mark.parametrize("view", ["transposed", "every other", "permuted", "expanded"])
def test_any_strides(backend, view):
    x = values_of((20, 30, 4), torch.float32).to(device_of(backend))
    x = {
        "transposed": x[:, :, 0].contiguous().mT,
        "every other": x[::2, 1::3],
        "permuted": x.permute(2, 0, 1),
        "expanded": x[:1].expand(5, -1, -1),
    }[view]
    name = "auto" if backend != "torch" else "torch"  # whichever backend takes it
    assert torch.equal(histogram(x, None, name).cpu(), definition(x, None))


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_an_error_and_counted(backend, dtype):
    x = values_of((100,), dtype)
    x[torch.tensor([3, 50])] = math.nan
    x[51] = math.inf
    with pytest.raises(NonFiniteWeightError, match="2 of 100"):
        kth_largest_magnitude(x.to(device_of(backend)), 100, backend=backend)


@each
def test_nan_that_shares_its_upper_half_with_infinity(backend):
    x = torch.tensor([0x7F800000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32).to(device_of(backend))
    with pytest.raises(NonFiniteWeightError, match="2 of 3"):
        kth_largest_magnitude(x, 1, backend=backend)


def test_takes_arrays_of_other_libraries():
    x, counts = np.array([3.0, -4.0, 0.0], dtype=np.float32), np.zeros(UPPER_BINS, dtype=np.int64)
    assert kth_largest_magnitude(x, 1) == 4.0
    assert add_magnitude_histogram(counts, x) is counts
    assert counts.sum() == 3


def test_ranks_within_bins():
    counts = torch.tensor([0, 2, 0, 3])
    assert [find_rank(counts, rank) for rank in (1, 2, 3, 5)] == [(1, 1), (1, 2), (3, 1), (3, 3)]
    for rank in (0, 6):
        with pytest.raises(ConfigError, match=rf"\[1, 5\].*{rank}"):
            find_rank(counts, rank)


@each
def test_empty_adds_nothing(backend):
    assert not histogram(torch.zeros(0, 3, device=device_of(backend)), None, backend).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lost", ["one count", "lower zeros", "upper"])
def test_the_self_check_finds_what_is_wrong(dtype, lost):
    def broken(counts, x, upper):
        select.reference.add_magnitude_histogram(counts, x, upper)
        if (lost == "upper" and upper is None) or (lost == "one count" and upper):
            counts[counts.nonzero()[0]] -= 1
        elif lost == "lower zeros" and upper == 0:
            counts[0] = 0

    cpu = torch.device("cpu")
    assert select._self_check(select.reference, cpu, dtype) is None
    wrong = select._self_check(SimpleNamespace(add_magnitude_histogram=broken), cpu, dtype)
    assert "differ from torch's in 1 bins" in wrong


@each_gpu_backend("cuda")
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_on_the_current_stream_and_twice_alike(backend, dtype):
    values, stream = values_of((70_001,), dtype).to("cuda"), torch.cuda.Stream()
    x = torch.zeros_like(values)
    counts = [torch.zeros(bins, dtype=torch.int64, device="cuda") for bins in (UPPER_BINS, UPPER_BINS, LOWER_BINS)]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        fill_late(x, values)
        for one, upper in zip(counts, (None, None, 0)):
            add_magnitude_histogram(one, x, upper, backend=backend)
    stream.synchronize()
    assert torch.equal(counts[0], counts[1])
    assert torch.equal(counts[0].cpu(), definition(values, None))
    assert torch.equal(counts[2].cpu(), definition(values, 0))


ones, bins = torch.ones(4), torch.zeros(UPPER_BINS, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: kth_largest_magnitude(ones, 0), ConfigError, r"\[1, 4\].*0"),
        (lambda: kth_largest_magnitude(ones, 5), ConfigError, r"\[1, 4\].*5"),
        (lambda: kth_largest_magnitude(torch.zeros(0), 1), ConfigError, r"\[1, 0\]"),
        (lambda: kth_largest_magnitude(ones.int(), 1), ConfigError, "int32"),
        (lambda: kth_largest_magnitude(ones, 1, backend="sort"), ConfigError, "sort"),
        (lambda: add_magnitude_histogram(bins[:-1], ones), ShapeMismatchError, r"32768.*\(32767,\)"),
        (lambda: add_magnitude_histogram(bins, ones, 5), ShapeMismatchError, r"65536.*\(32768,\)"),
        (lambda: add_magnitude_histogram(bins.int(), ones), ConfigError, "int32"),
        (lambda: add_magnitude_histogram(bins.repeat(2)[::2], ones), ConfigError, r"strides \(2,\)"),
        (lambda: add_magnitude_histogram(bins, ones.to("meta")), ConfigError, "meta"),
        (lambda: add_magnitude_histogram(bins, ones, minus=ones[:3]), ShapeMismatchError, r"minus.*\(3,\).*\(4,\)"),
        (lambda: add_magnitude_histogram(bins, ones, minus=ones.int()), ConfigError, "minus.*int32"),
        (lambda: add_magnitude_histogram(bins, ones, minus=ones.to("meta")), ConfigError, "minus on meta"),
        (lambda: add_magnitude_histogram(bins.repeat(2), ones, UPPER_BINS), ConfigError, "32768"),
        (lambda: add_magnitude_histogram(bins.repeat(2), ones, -1), ConfigError, "-1"),
    ],
)
def test_errors_name_the_values(call, error, match):
    with pytest.raises(error, match=match):
        call()

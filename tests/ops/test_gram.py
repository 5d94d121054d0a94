from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import BackendError, ConfigError, ShapeMismatchError
from bmm_engine.ops import _native
from bmm_engine.ops.gram import ACCUMULATE_DTYPES, accumulate_gram, cpu
from tests.numerics import assert_as_good_as_torch

BACKENDS = ["torch", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# rows, in: aligned, ragged, size 1, fewer rows than columns, several panels in depth, several blocks wide
SHAPES = [(512, 96), (301, 133), (1, 1), (1, 77), (7, 49), (1300, 50), (40, 515)]

needs_cpu = pytest.mark.skipif(_native.cpu_missing() is not None, reason=str(_native.cpu_missing()))
each_backend = pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_cpu)])
each_isa = pytest.mark.parametrize("isa", cpu.isas() if _native.cpu_missing() is None else [])


def truth(G, X, weights=None):
    X = X.double().reshape(-1, X.shape[-1])
    weights = torch.ones(len(X)) if weights is None else weights.reshape(-1)
    X, weights = X[weights != 0], weights[weights != 0].double()
    return G.double() + X.T @ (weights[:, None] * X)


def plain_torch(G, X):
    X = X.to(G.dtype).reshape(-1, X.shape[-1])
    return G + X.T @ X


def start(n, dtype):
    """A symmetric G that is not zero, in the dtype that rows of `dtype` accumulate in."""
    G = torch.randn(n, n, dtype=ACCUMULATE_DTYPES[dtype])
    return G + G.T


def assert_symmetric(G):
    assert torch.equal(G, G.T)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(backend, dtype, shape):
    X, G = torch.randn(shape).to(dtype), start(shape[1], dtype)
    expected, same_dtype = truth(G, X), plain_torch(G, X)
    assert accumulate_gram(G, X, backend=backend) is G
    assert_as_good_as_torch(G, same_dtype, expected)
    assert_symmetric(G)


@needs_cpu
@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set(isa, dtype, shape):
    X, G = torch.randn(shape).to(dtype), start(shape[1], dtype)
    weights = torch.rand(shape[0], dtype=G.dtype).mul(3).round()
    expected = truth(G, X, weights)
    same_dtype = G + X.to(G.dtype).T @ (weights[:, None] * X.to(G.dtype))
    cpu.accumulate_gram(G, X, weights, isa=isa)
    assert_as_good_as_torch(G, same_dtype, expected)
    assert_symmetric(G)


@needs_cpu
@each_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_widened_exactly(isa, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for values in every[every.isfinite()].split(1000):
        row = torch.cat([torch.ones(1, dtype=dtype), values])  # the products with 1 are exact
        G = torch.zeros(len(row), len(row))
        cpu.accumulate_gram(G, row, None, isa=isa)
        assert torch.equal(G[0], row.float())


@needs_cpu
def test_infinite_and_nan_16_bit_values_stay_so():
    for dtype in (torch.float16, torch.bfloat16):
        for value in (float("inf"), float("-inf"), float("nan")):
            G = accumulate_gram(torch.zeros(2, 2), torch.tensor([[value, 1.0]], dtype=dtype), backend="cpu")
            torch.testing.assert_close(G[0, 1].item(), value, rtol=0, atol=0, equal_nan=True)


def views(dtype):
    base = torch.randn(60, 130).to(dtype)
    batch = torch.randn(5, 12, 70).to(dtype)
    return {
        "transposed": base.T,
        "every other column": base[:, ::2],
        "every other row": base[::2],
        "columns cut out": base[:, 3:50],
        "padded batch": batch[:, :7],
        "leading dims permuted": batch.transpose(0, 1),
        "four dims, no joint view": torch.randn(3, 4, 5, 20).to(dtype)[:, 1:, :3, ::2],
        "one row repeated": base[:1].expand(9, -1),
        "a single vector": base[0],
    }


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", views(torch.float32))
def test_strided_views(backend, dtype, name):
    X = views(dtype)[name]
    for weights in (None, torch.rand(X.shape[:-1])):
        G = start(X.shape[-1], dtype)
        expected = truth(G, X, weights)
        same_dtype = accumulate_gram(G.clone(), X.contiguous(), weights, backend="torch")
        accumulate_gram(G, X, weights, backend=backend)
        assert_as_good_as_torch(G, same_dtype, expected)
        assert_symmetric(G)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_equal_one_shot(backend, dtype):
    X, G = torch.randn(700, 65).to(dtype), start(65, dtype)
    expected, same_dtype = truth(G, X), plain_torch(G, X)
    for chunk in X.split([1, 255, 0, 300, 144]):
        accumulate_gram(G, chunk, backend=backend)
    assert_as_good_as_torch(G, same_dtype, expected)
    assert_symmetric(G)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_bits_do_not_depend_on_threads(dtype, weighted):
    X, weights = torch.randn(1500, 530).to(dtype), torch.rand(1500)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        G = torch.zeros(530, 530, dtype=ACCUMULATE_DTYPES[dtype])
        results.append(accumulate_gram(G, X, weights if weighted else None, backend="cpu"))
    assert all(torch.equal(results[0], other) for other in results[1:])


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_of_weight_zero_may_hold_anything(backend, dtype, bad):
    X = torch.randn(4, 90, 33).to(dtype)
    mask = torch.rand(4, 90) > 0.4
    G = start(33, dtype)
    clean = accumulate_gram(G.clone(), X[mask], backend=backend)
    X[~mask] = bad
    for weights in (mask, mask.to(torch.float16), mask.double()):
        torch.testing.assert_close(accumulate_gram(G.clone(), X, weights, backend=backend), clean)


@each_backend
def test_a_row_with_nan_and_weight_shows(backend):
    X = torch.randn(20, 60)
    X[3, 5] = float("nan")
    G = accumulate_gram(torch.zeros(60, 60), X, torch.ones(20), backend=backend)
    assert G[5].isnan().all()
    assert G[:, 5].isnan().all()


@each_backend
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0,), (4, 0)])
def test_nothing_to_add_is_a_no_op(backend, shape):
    G = start(shape[-1], torch.float32)
    before = G.clone()
    accumulate_gram(G, torch.empty(shape), backend=backend)
    assert torch.equal(G, before)
    X = torch.full((6, shape[-1]), float("nan"))
    accumulate_gram(G, X, torch.zeros(6), backend=backend)
    assert torch.equal(G, before)


@needs_cpu
def test_g_may_be_a_window():
    big = torch.zeros(40, 100)
    X = torch.randn(30, 40)
    accumulate_gram(big[:, 20:60], X, backend="cpu")
    torch.testing.assert_close(big[:, 20:60], X.T @ X)
    assert not big[:, :20].any()
    assert not big[:, 60:].any()
    with pytest.raises(BackendError, match="strides"):
        accumulate_gram(torch.zeros(40, 80)[:, ::2], X, backend="cpu")
    torch.testing.assert_close(accumulate_gram(torch.zeros(40, 80)[:, ::2], X), X.T @ X)


@given(
    rows=st.integers(0, 60),
    n=st.integers(1, 70),
    scale=st.sampled_from([0.5, 2.0, -4.0]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from([name for name in BACKENDS if name == "torch" or _native.cpu_missing() is None]),
)
def test_laws(rows, n, scale, seed, dtype, backend):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, n, generator=generator).to(dtype)
    weights = torch.randint(0, 3, (rows,), generator=generator).float()
    accumulate = ACCUMULATE_DTYPES[dtype]

    def gram(x, w=None):
        return accumulate_gram(torch.zeros(n, n, dtype=accumulate), x, w, backend=backend)

    G = gram(X)
    assert_symmetric(G)
    if dtype != torch.float16:  # where small values turn subnormal
        assert torch.equal(gram(X * scale), G * scale**2), "powers of two scale exactly"
    # an integer weight is as many copies of the row
    copies = X.repeat_interleave(weights.long(), dim=0)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * max(1.0, G.abs().max().item())}
    torch.testing.assert_close(gram(X, weights), gram(copies), **tolerance)
    # the order of columns is the order of G's rows and columns
    order = torch.randperm(n, generator=generator)
    torch.testing.assert_close(gram(X[:, order]), G[order][:, order], **tolerance)
    # positive semi-definite up to rounding
    smallest = torch.linalg.eigvalsh(G.double())[0].item()
    assert smallest >= -1e-5 * max(1.0, G.diagonal().sum().item())


@pytest.mark.parametrize(
    ("G", "X", "weights", "error", "match"),
    [
        (torch.zeros(3, 3), torch.zeros(5, 4), None, ShapeMismatchError, r"\(3, 3\).*\(5, 4\)"),
        (torch.zeros(4), torch.zeros(5, 4), None, ShapeMismatchError, r"\(4,\)"),
        (torch.zeros(4, 4), torch.tensor(1.0), None, ShapeMismatchError, r"\(\)"),
        (torch.zeros(4, 4), torch.zeros(5, 4), torch.ones(4), ShapeMismatchError, r"\(5,\).*\(4,\)"),
        (torch.zeros(4, 4), torch.zeros(2, 5, 4), torch.ones(10), ShapeMismatchError, r"\(2, 5\)"),
        (torch.zeros(4, 4), torch.zeros(5, 4, dtype=torch.int32), None, ConfigError, "int32"),
        (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(5, 4), None, ConfigError, "float64"),
        (torch.zeros(4, 4), torch.zeros(5, 4, dtype=torch.float64), None, ConfigError, "float64"),
        (torch.zeros(4, 4), torch.zeros(5, 4), torch.ones(5, dtype=torch.int64), ConfigError, "int64"),
        (torch.zeros(4, 4), torch.zeros(2, 4), torch.tensor([1.0, -2.0]), ConfigError, "-2.0"),
        (torch.zeros(4, 4), torch.zeros(2, 4), torch.tensor([1.0, float("nan")]), ConfigError, "nan"),
        (torch.zeros(4, 4), torch.zeros(2, 4), torch.tensor([float("inf"), 0.0]), ConfigError, "inf"),
        (torch.zeros(4, 4, device="meta"), torch.zeros(5, 4), None, ConfigError, "meta"),
    ],
)
def test_errors_name_the_values(G, X, weights, error, match):
    with pytest.raises(error, match=match):
        accumulate_gram(G, X, weights)

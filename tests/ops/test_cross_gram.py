from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import BackendError, ConfigError, ShapeMismatchError
from bmm_engine.ops import _native
from bmm_engine.ops.cross_gram import accumulate_cross_gram
from bmm_engine.ops.gram import ACCUMULATE_DTYPES
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

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# rows, in_x, in_y: aligned, ragged, size 1, fewer rows than columns, unlike widths
SHAPES = [(256, 64, 64), (301, 133, 70), (1, 1, 1), (1, 40, 3), (7, 5, 150), (700, 30, 40)]
TRITON_SHAPES = [(64, 32, 32), (150, 40, 20), (1, 1, 1), (1, 40, 3), (7, 5, 40)] if INTERPRETED else SHAPES

each = each_backend("torch", "cpu", "triton")
each_shape = each_backend_and("shape", {"torch": SHAPES, "cpu": SHAPES, "triton": TRITON_SHAPES})


def truth(C, X, Y, weights=None):
    X, Y = (tensor.double().reshape(-1, tensor.shape[-1]) for tensor in (X, Y))
    weights = X.new_ones(len(X)) if weights is None else weights.reshape(-1)
    kept = weights != 0
    return C.double() + X[kept].T @ (weights[kept, None].double() * Y[kept])


def start(n, m, dtype, device="cpu"):
    """C and G that are not zero, G symmetric, in the dtype that rows of `dtype` accumulate in."""
    C, G = (torch.randn(size, m, dtype=ACCUMULATE_DTYPES[dtype]).to(device) for size in (n, m))
    return C, G + G.T


@each_shape
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighting", ["plain", "mask", "numbers"])
@pytest.mark.parametrize("with_gram", [False, True])
def test_equals_the_definition(backend, dtype, shape, weighting, with_gram):
    if backend == "triton" and (dtype == torch.float64 or (INTERPRETED and dtype == torch.float16)):
        return  # see test_float64_rows_are_not_for_triton; all 16-bit rows take the same path
    (rows, n, m), device = shape, device_of(backend)
    X, Y = (torch.randn(rows, size).to(dtype).to(device) for size in (n, m))
    C, G = start(n, m, dtype, device)
    numbers = torch.rand(rows, device=device)
    weights = {"plain": None, "mask": numbers > 0.3, "numbers": numbers}[weighting]
    expected = truth(C, X, Y, weights), truth(G, Y, Y, weights)
    same = C.clone(), G.clone()
    accumulate_cross_gram(same[0], X, Y, weights, G=same[1], backend="torch")
    before = G.clone()
    assert accumulate_cross_gram(C, X, Y, weights, G=G if with_gram else None, backend=backend) is C
    assert_as_good_as_torch(C, same[0], expected[0])
    if with_gram:
        assert_as_good_as_torch(G, same[1], expected[1])
        assert torch.equal(G, G.T)
    else:
        assert torch.equal(G, before)


@each
def test_of_x_with_itself_it_is_the_gram(backend):
    X = torch.randn(90, 37, device=device_of(backend))
    C, G = (torch.zeros(37, 37, device=X.device) for _ in range(2))
    accumulate_cross_gram(C, X, X, G=G, backend=backend)
    torch.testing.assert_close(C, G)


def pairs(device, dtype):
    x, y = torch.randn(3, 4, 30).to(dtype).to(device), torch.randn(3, 4, 37).to(dtype).to(device)
    return {
        "both transposed": (torch.randn(30, 24).to(dtype).to(device).T, torch.randn(20, 24).to(dtype).to(device).T),
        "one transposed": (x[0], torch.randn(20, 4).to(dtype).to(device).T),
        "every other column": (x[..., ::2], y),
        "columns cut out": (x[0, :, 3:20], y[0, :, 1:]),
        "one padded batch": (x[:, :3], y[:, :3].contiguous()),
        "leading dims permuted": (x[:2].transpose(0, 1), y[:2].transpose(0, 1).contiguous()),
        "single vectors": (x[0, 0], y[0, 0]),
    }


@each_backend_and("dtype", {"torch": DTYPES, "cpu": DTYPES, "triton": DTYPES[: 1 if INTERPRETED else 3]})
@pytest.mark.parametrize("name", pairs("cpu", torch.float32))
def test_strided_views(backend, dtype, name):
    X, Y = pairs(device_of(backend), dtype)[name]
    for weights in (None, torch.rand(X.shape[:-1], device=X.device)):
        C, G = start(X.shape[-1], Y.shape[-1], dtype, X.device)
        expected, same = (truth(C, X, Y, weights), truth(G, Y, Y, weights)), (C.clone(), G.clone())
        accumulate_cross_gram(same[0], X.contiguous(), Y.contiguous(), weights, G=same[1], backend="torch")
        accumulate_cross_gram(C, X, Y, weights, G=G, backend=backend)
        assert_as_good_as_torch(C, same[0], expected[0])
        assert_as_good_as_torch(G, same[1], expected[1])
        assert torch.equal(G, G.T)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_of_weight_zero_may_hold_anything(backend, dtype):
    X, Y = (torch.randn(4, 20, n).to(dtype).to(device_of(backend)) for n in (17, 9))
    mask = torch.rand(4, 20, device=X.device) > 0.4
    clean_C, clean_G = start(17, 9, dtype, X.device)
    dirty = [(clean_C.clone(), clean_G.clone()) for _ in range(2)]
    accumulate_cross_gram(clean_C, X[mask], Y[mask], G=clean_G, backend=backend)
    X[~mask], Y[~mask] = float("nan"), float("inf")
    for weights, (C, G) in zip((mask, mask.double()), dirty):
        accumulate_cross_gram(C, X, Y, weights, G=G, backend=backend)
        torch.testing.assert_close(C, clean_C)
        torch.testing.assert_close(G, clean_G)


@each
def test_a_row_with_nan_and_weight_shows(backend):
    X, Y = torch.randn(20, 6, device=device_of(backend)), torch.randn(20, 4, device=device_of(backend))
    X[3, 5] = float("nan")
    C, G = X.new_zeros(6, 4), X.new_zeros(4, 4)
    accumulate_cross_gram(C, X, Y, X.new_ones(20), G=G, backend=backend)
    assert C[5].isnan().all()
    assert C.isnan().sum() == 4
    assert G.isfinite().all()


@each
def test_chunks_equal_one_shot(backend):
    X, Y = torch.randn(300, 30, device=device_of(backend)), torch.randn(300, 20, device=device_of(backend))
    C, G = start(30, 20, torch.float32, X.device)
    expected, same = (truth(C, X, Y), truth(G, Y, Y)), (C + X.T @ Y, G + Y.T @ Y)
    sizes = [1, 127, 0, 100, 72]
    for x, y in zip(X.split(sizes), Y.split(sizes)):
        accumulate_cross_gram(C, x, y, G=G, backend=backend)
    assert_as_good_as_torch(C, same[0], expected[0])
    assert_as_good_as_torch(G, same[1], expected[1])


@each
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_precision(backend, precision):
    rows, n, m = (100, 30, 20) if backend == "triton" and INTERPRETED else (1500, 200, 130)
    X, Y = torch.randn(rows, n, device=device_of(backend)), torch.randn(rows, m, device=device_of(backend))
    C = X.new_zeros(n, m)
    same_dtype = accumulate_cross_gram(C.clone(), X, Y, backend="torch")
    expected, magnitude = truth(C, X, Y), truth(C, X.abs(), Y.abs())
    accumulate_cross_gram(C, X, Y, precision=precision, backend=backend)
    assert_as_precise(C, same_dtype, expected, magnitude, precision)


@each
@pytest.mark.parametrize(("x", "y"), [((0, 5), (0, 3)), ((3, 0, 5), (3, 0, 3)), ((4, 0), (4, 0))])
def test_nothing_to_add_is_a_no_op(backend, x, y):
    C, G = start(x[-1], y[-1], torch.float32, device_of(backend))
    before = C.clone(), G.clone()
    accumulate_cross_gram(C, torch.empty(x, device=C.device), torch.empty(y, device=C.device), G=G, backend=backend)
    assert torch.equal(C, before[0])
    assert torch.equal(G, before[1])


@each
def test_x_without_columns_leaves_the_gram_of_y(backend):
    Y = torch.randn(6, 4, device=device_of(backend))
    C, G = Y.new_zeros(0, 4), Y.new_zeros(4, 4)
    accumulate_cross_gram(C, Y[:, :0], Y, G=G, backend=backend)
    torch.testing.assert_close(G, Y.T @ Y)


@each
def test_nothing_is_written_beside_c_and_g(backend):
    X, Y = torch.randn(30, 20, device=device_of(backend)), torch.randn(30, 12, device=device_of(backend))
    big_C, big_G = X.new_zeros(20, 40), X.new_zeros(12, 40)
    accumulate_cross_gram(big_C[:, 5:17], X, Y, G=big_G[:, 7:19], backend=backend)
    torch.testing.assert_close(big_C[:, 5:17], X.T @ Y)
    torch.testing.assert_close(big_G[:, 7:19], Y.T @ Y)
    for big, inside in ((big_C, slice(5, 17)), (big_G, slice(7, 19))):
        big[:, inside] = 0
        assert not big.any()


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype):
    X, Y, weights = torch.randn(900, 130).to(dtype), torch.randn(900, 270).to(dtype), torch.rand(900)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        C, G = (torch.zeros(n, 270, dtype=ACCUMULATE_DTYPES[dtype]) for n in (130, 270))
        results.append((accumulate_cross_gram(C, X, Y, weights, G=G, backend="cpu"), G))
    for C, G in results[1:]:
        assert torch.equal(C, results[0][0])
        assert torch.equal(G, results[0][1])


@each_backend("triton")
def test_float64_rows_are_not_for_triton(backend):
    C, X, Y = (torch.zeros(4, 4, dtype=torch.float64, device=device_of(backend)) for _ in range(3))
    with pytest.raises(BackendError, match="float64"):
        accumulate_cross_gram(C, X, Y, backend=backend)
    accumulate_cross_gram(C, X, Y)  # auto finds another


@given(
    rows=st.integers(0, 40),
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    backend=st.sampled_from(["torch", "cpu"] if _native.cpu_missing() is None else ["torch"]),
)
def test_laws(rows, n, m, seed, backend):
    generator = torch.Generator().manual_seed(seed)
    X, Y = torch.randn(rows, n, generator=generator), torch.randn(rows, m, generator=generator)

    def cross(x, y, w=None):
        return accumulate_cross_gram(torch.zeros(x.shape[-1], y.shape[-1]), x, y, w, backend=backend)

    C = cross(X, Y)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(cross(Y, X), C.T, **close)
    assert torch.equal(cross(X * 2, Y * -4), C * -8), "powers of two scale exactly"
    order = torch.randperm(rows, generator=generator)
    torch.testing.assert_close(cross(X[order], Y[order]), C, **close)
    weights = torch.rand(rows, generator=generator)
    torch.testing.assert_close(cross(X, Y, weights), cross(X * weights[:, None], Y), **close)


C, G, X, Y = torch.zeros(4, 3), torch.zeros(3, 3), torch.zeros(2, 4), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: accumulate_cross_gram(C, X, Y[:1]), ShapeMismatchError, r"\(2, 4\).*\(1, 3\)"),
        (lambda: accumulate_cross_gram(C, X, Y[None]), ShapeMismatchError, r"\(2, 4\).*\(1, 2, 3\)"),
        (lambda: accumulate_cross_gram(C, torch.tensor(1.0), Y), ShapeMismatchError, r"\(\)"),
        (lambda: accumulate_cross_gram(C.T, X, Y), ShapeMismatchError, r"C must be.*\(3, 4\)"),
        (lambda: accumulate_cross_gram(C, X, Y, G=torch.zeros(4, 4)), ShapeMismatchError, r"G must be.*\(4, 4\)"),
        (lambda: accumulate_cross_gram(C, X, Y, torch.ones(3)), ShapeMismatchError, r"\(3,\)"),
        (lambda: accumulate_cross_gram(C, X.int(), Y.int()), ConfigError, "int32"),
        (lambda: accumulate_cross_gram(C, X, Y.half()), ConfigError, "float32, Y is torch.float16"),
        (lambda: accumulate_cross_gram(C.double(), X, Y), ConfigError, "C is torch.float64"),
        (lambda: accumulate_cross_gram(C, X, Y, G=G.double()), ConfigError, "G is torch.float64"),
        (lambda: accumulate_cross_gram(C, X, Y, G=G.to("meta")), ConfigError, "meta"),
        (lambda: accumulate_cross_gram(C[:3], X[:, :3], Y, G=C[:3]), ConfigError, "share their memory"),
        (lambda: accumulate_cross_gram(C, X, Y, torch.tensor([1.0, -2.0])), ConfigError, "-2.0"),
        (lambda: accumulate_cross_gram(C, X, Y, torch.ones(2, dtype=torch.int64)), ConfigError, "int64"),
        (lambda: accumulate_cross_gram(C, X, Y, precision="half"), ConfigError, "half"),
        (lambda: accumulate_cross_gram(C, X, Y, backend="cuda"), ConfigError, "cuda"),
    ],
)
def test_errors_name_the_values(call, error, match):
    with pytest.raises(error, match=match):
        call()


@each_gpu_backend("triton")
def test_work_on_a_side_stream_is_in_its_order(backend):
    rows, stream = torch.randn(500, 64, device="cuda"), torch.cuda.Stream()
    X, C, G = torch.zeros_like(rows), torch.zeros(64, 64, device="cuda"), torch.zeros(64, 64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        fill_late(X, rows)
        accumulate_cross_gram(C, X, X, G=G, backend=backend)
    stream.synchronize()
    for got in (C, G):
        torch.testing.assert_close(got, rows.T @ rows)


@needs_two_devices
@each_gpu_backend("triton")
def test_on_a_device_that_is_not_the_current(backend):
    X = torch.randn(50, 20, device="cuda:1")
    with torch.cuda.device(0):
        C = accumulate_cross_gram(torch.zeros(20, 20, device="cuda:1"), X, X, backend=backend)
    torch.testing.assert_close(C, X.T @ X)

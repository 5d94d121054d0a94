from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import BackendError, ConfigError, ShapeMismatchError
from bmm_engine.ops import _native, _triton
from bmm_engine.ops.gram import ACCUMULATE_DTYPES, accumulate_gram, accumulate_grams, cpu
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
# rows, in: aligned, ragged, size 1, fewer rows than columns, several panels in depth, several blocks wide
SHAPES = [(512, 96), (301, 133), (1, 1), (1, 77), (7, 49), (1300, 50), (40, 515)]
# The interpreter's tiles are small: several of them, several splits of the rows, several partial sums in one.
TRITON_SHAPES = [(64, 32), (200, 40), (1, 1), (1, 37), (170, 20)] if INTERPRETED else [*SHAPES, (5000, 1056)]
# All 16-bit rows take the same path, and the interpreter its time.
FEWER_DTYPES = {"torch": DTYPES, "cpu": DTYPES, "triton": DTYPES[: 2 if INTERPRETED else 3]}

if _triton.missing() is None:
    import triton
    import triton.language as tl

    from bmm_engine.ops._triton_tiles import upper_tile

    @triton.jit
    def number_tiles(numbers, rows, columns, count, BLOCK: tl.constexpr):
        own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        i, j = upper_tile(tl.load(numbers + own, mask=own < count, other=0))
        tl.store(rows + own, i, mask=own < count)
        tl.store(columns + own, j, mask=own < count)


each = each_backend("torch", "cpu", "triton")
each_isa = pytest.mark.parametrize("isa", cpu.isas() if _native.cpu_missing() is None else [])


def truth(G, X, weights=None):
    X = X.double().reshape(-1, X.shape[-1])
    weights = X.new_ones(len(X)) if weights is None else weights.reshape(-1)
    X, weights = X[weights != 0], weights[weights != 0].double()
    return G.double() + X.T @ (weights[:, None] * X)


def plain_torch(G, X):
    X = X.to(G.dtype).reshape(-1, X.shape[-1])
    return G + X.T @ X


def start(n, dtype, device="cpu"):
    """A symmetric G that is not zero, in the dtype that rows of `dtype` accumulate in."""
    G = torch.randn(n, n, dtype=ACCUMULATE_DTYPES[dtype])
    return (G + G.T).to(device)


def assert_symmetric(G):
    assert torch.equal(G, G.T)


@each_backend_and("shape", {"torch": SHAPES[:5], "cpu": SHAPES, "triton": TRITON_SHAPES})
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighting", ["plain", "mask", "numbers"])
def test_equals_the_definition(backend, dtype, shape, weighting):
    if backend == "triton" and dtype == torch.float64:
        return  # see test_float64_rows_are_not_for_triton
    device = device_of(backend)
    X, G = torch.randn(shape).to(dtype).to(device), start(shape[1], dtype, device)
    numbers = torch.rand(shape[0], device=device)
    weights = {"plain": None, "mask": numbers > 0.3, "numbers": numbers}[weighting]
    expected, same_dtype = truth(G, X, weights), accumulate_gram(G.clone(), X, weights, backend="torch")
    assert accumulate_gram(G, X, weights, backend=backend) is G
    assert_as_good_as_torch(G, same_dtype, expected)
    assert_symmetric(G)


def test_torch_itself_is_as_good_as_one_product():
    X, G = torch.randn(70, 30), start(30, torch.float32)
    expected, same_dtype = truth(G, X), plain_torch(G, X)
    assert_as_good_as_torch(accumulate_gram(G, X, backend="torch"), same_dtype, expected)


@each
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
@pytest.mark.parametrize("weighted", [False, True])
def test_precision(backend, precision, weighted):
    shape = (100, 30) if backend == "triton" and INTERPRETED else (1500, 200)
    X = torch.randn(shape, device=device_of(backend))
    weights = torch.rand(shape[0], device=X.device) if weighted else None
    G = torch.zeros(shape[1], shape[1], device=X.device)
    same_dtype = accumulate_gram(G.clone(), X, weights, backend="torch")
    expected, magnitude = truth(G, X, weights), truth(G, X.abs(), weights)
    accumulate_gram(G, X, weights, backend, precision=precision)
    assert_as_precise(G, same_dtype, expected, magnitude, precision)
    assert_symmetric(G)


def test_torch_is_exact_whatever_the_process_allows():
    X = torch.randn(300, 40)
    expected = accumulate_gram(torch.zeros(40, 40), X, backend="torch")
    torch.backends.cuda.matmul.allow_tf32 = True  # restored after each test
    assert torch.equal(accumulate_gram(torch.zeros(40, 40), X, backend="torch"), expected)
    assert torch.backends.cuda.matmul.allow_tf32


@each_backend("triton")
def test_every_tile_has_one_number(backend):
    sides = torch.arange(1, 5000, dtype=torch.int32, device=device_of(backend))
    begins = sides * (sides + 1) // 2  # the first of each column: where rounding would show
    numbers = torch.cat([torch.arange(1000, dtype=torch.int32, device=sides.device), begins, begins - 1])
    i, j = torch.empty_like(numbers), torch.empty_like(numbers)
    number_tiles[triton.cdiv(len(numbers), 1024),](numbers, i, j, len(numbers), BLOCK=1024)
    assert bool(((i >= 0) & (i <= j)).all())
    assert torch.equal(j * (j + 1) // 2 + i, numbers)


@each_backend("triton")
def test_float64_rows_are_not_for_triton(backend):
    X, G = (torch.zeros(4, 4, dtype=torch.float64, device=device_of(backend)) for _ in range(2))
    with pytest.raises(BackendError, match="float64"):
        accumulate_gram(G, X, backend=backend)
    accumulate_gram(G, X)  # auto finds another


@each_backend("triton")
def test_strides_beyond_32_bit_offsets_are_not_for_triton(backend):
    far = torch.empty(2**24 + 1, device=device_of(backend)).as_strided((2, 3), (2**24, 0))
    with pytest.raises(BackendError, match=r"X has strides \(16777216, 0\)"):
        accumulate_gram(torch.zeros(3, 3, device=far.device), far, backend=backend)


@needs_cpu
@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set(isa, dtype, shape):
    X, G = torch.randn(shape).to(dtype), start(shape[1], dtype)
    weights = torch.rand(shape[0], dtype=G.dtype).mul(3).round()
    expected = truth(G, X, weights)
    same_dtype = G + X.to(G.dtype).T @ (weights[:, None] * X.to(G.dtype))
    cpu.accumulate_gram(G, X, weights, "ieee", isa=isa)
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
        cpu.accumulate_gram(G, row, None, "ieee", isa=isa)
        truth = row.float()
        if dtype == torch.bfloat16 and isa == "avx512_bf16":  # the instruction takes subnormal numbers as zero
            truth[truth.abs() < torch.finfo(torch.float32).tiny] = 0
        assert torch.equal(G[0], truth)


@needs_cpu
def test_infinite_and_nan_16_bit_values_stay_so():
    for dtype in (torch.float16, torch.bfloat16):
        for value in (float("inf"), float("-inf"), float("nan")):
            G = accumulate_gram(torch.zeros(2, 2), torch.tensor([[value, 1.0]], dtype=dtype), backend="cpu")
            torch.testing.assert_close(G[0, 1].item(), value, rtol=0, atol=0, equal_nan=True)


def views(dtype, device="cpu", small=False):
    base = torch.randn((30, 40) if small else (60, 130)).to(dtype).to(device)
    batch = torch.randn((3, 8, 20) if small else (5, 12, 70)).to(dtype).to(device)
    return {
        "transposed": base.T,
        "every other column": base[:, ::2],
        "every other row": base[::2],
        "columns cut out": base[:, 3:35],
        "padded batch": batch[:, :7],
        "leading dims permuted": batch[:, :4].transpose(0, 1),
        "four dims, no joint view": torch.randn(3, 4, 5, 20).to(dtype).to(device)[:, 1:, :3, ::2],
        "one row repeated": base[:1].expand(9, -1),
        "a single vector": base[0],
    }


@each_backend_and("dtype", FEWER_DTYPES)
@pytest.mark.parametrize("name", views(torch.float32))
def test_strided_views(backend, dtype, name):
    X = views(dtype, device_of(backend), small=backend == "triton" and INTERPRETED)[name]
    for weights in (None, torch.rand(X.shape[:-1], device=X.device)):
        G = start(X.shape[-1], dtype, X.device)
        expected = truth(G, X, weights)
        same_dtype = accumulate_gram(G.clone(), X.contiguous(), weights, backend="torch")
        accumulate_gram(G, X, weights, backend=backend)
        assert_as_good_as_torch(G, same_dtype, expected)
        assert_symmetric(G)


@each_backend_and("dtype", FEWER_DTYPES)
def test_chunks_equal_one_shot(backend, dtype):
    X = torch.randn(300, 30).to(dtype).to(device_of(backend))
    G = start(30, dtype, X.device)
    expected, same_dtype = truth(G, X), plain_torch(G, X)
    for chunk in X.split([1, 127, 0, 100, 72]):
        accumulate_gram(G, chunk, backend=backend)
    assert_as_good_as_torch(G, same_dtype, expected)
    assert_symmetric(G)


@each_backend_and("dtype", FEWER_DTYPES)
@pytest.mark.parametrize("weighting", ["plain", "mask", "numbers"])
@pytest.mark.parametrize("counts", [(130, 1, 0, 70), (60, 64, 3), (40,)])
def test_a_group_equals_one_after_another(backend, dtype, weighting, counts):
    device = device_of(backend)
    Xs = [torch.randn(rows, 20).to(dtype).to(device) for rows in counts]
    weights = [torch.rand(X.shape[0], device=device) for X in Xs]
    weights = {"plain": None, "mask": [w > 0.5 for w in weights], "numbers": weights}[weighting]
    Gs = [start(20, dtype, device) for _ in Xs]
    every = list(zip(Gs, Xs, weights or [None] * len(Xs)))
    expected = [truth(*one) for one in every]
    same_dtype = [accumulate_gram(G.clone(), X, w, backend="torch") for G, X, w in every]
    assert accumulate_grams(Gs, Xs, weights, backend=backend) is Gs
    for G, own, true in zip(Gs, same_dtype, expected):
        assert_as_good_as_torch(G, own, true)
        assert_symmetric(G)


@each
def test_a_group_of_different_layouts(backend):
    device = device_of(backend)
    Xs = [torch.randn(40, 24), torch.randn(24, 50).T, torch.randn(3, 10, 24)[:, 1:], torch.randn(41, 25)[1:, 1:]]
    Xs = [X.to(device) for X in Xs] + [torch.randn(3, 20, 24, device=device)[:, 3:9]]
    weights = [None, torch.rand(50, device=device), None, torch.rand(40, device=device) > 0.5, None]
    Gs = [torch.zeros(24, 24, device=device) for _ in Xs]
    Gs[3] = torch.zeros(30, 30, device=device)[2:26, 3:27]
    expected = [truth(*one) for one in zip(Gs, Xs, weights)]
    for G, true in zip(accumulate_grams(Gs, Xs, weights, backend), expected):
        torch.testing.assert_close(G.double(), true, rtol=1e-5, atol=1e-5)


@each_backend("triton")
def test_a_group_is_one_launch(backend, monkeypatch):
    kernels = importlib.import_module("bmm_engine.ops.gram.triton_kernel")
    launch, launched = kernels._accumulate_group, []
    monkeypatch.setattr(kernels, "_accumulate_one", lambda *call: pytest.fail("one was launched alone"))
    monkeypatch.setattr(kernels, "_accumulate_group", lambda *call: (launched.append(len(call[0])), launch(*call)))
    Xs = [torch.randn(rows, 8, device=device_of(backend)) for rows in (9, 4, 100)]
    accumulate_grams([X.new_zeros(8, 8) for X in Xs], Xs, backend=backend)
    assert launched == [3]


@each_backend_and("dtype", FEWER_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_of_weight_zero_may_hold_anything(backend, dtype, bad):
    X = torch.randn(4, 20, 17).to(dtype).to(device_of(backend))
    mask = torch.rand(4, 20, device=X.device) > 0.4
    G = start(17, dtype, X.device)
    clean = accumulate_gram(G.clone(), X[mask], backend=backend)
    X[~mask] = bad
    for weights in (mask, mask.to(torch.float16), mask.double()):
        torch.testing.assert_close(accumulate_gram(G.clone(), X, weights, backend=backend), clean)


@each
def test_a_row_with_nan_and_weight_shows(backend):
    X = torch.randn(20, 60, device=device_of(backend))
    X[3, 5] = float("nan")
    for weights in (None, X.new_ones(20), X.new_ones(20) > 0):
        G = accumulate_gram(X.new_zeros(60, 60), X, weights, backend=backend)
        assert G[5].isnan().all()
        assert G[:, 5].isnan().all()
        assert G.isnan().sum() == 2 * 60 - 1


@each
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0,), (4, 0)])
def test_nothing_to_add_is_a_no_op(backend, shape):
    G = start(shape[-1], torch.float32, device_of(backend))
    before = G.clone()
    accumulate_gram(G, torch.empty(shape, device=G.device), backend=backend)
    accumulate_grams([G], [torch.empty(shape, device=G.device)], backend=backend)
    assert torch.equal(G, before)
    X = torch.full((6, shape[-1]), float("nan"), device=G.device)
    accumulate_gram(G, X, X.new_zeros(6), backend=backend)
    assert torch.equal(G, before)


def test_no_group_is_a_no_op():
    assert accumulate_grams([], []) == []


@each
def test_nothing_is_written_beside_g(backend):
    big, X = torch.zeros(40, 100, device=device_of(backend)), torch.randn(30, 40, device=device_of(backend))
    accumulate_gram(big[:, 20:60], X, backend=backend)
    torch.testing.assert_close(big[:, 20:60], X.T @ X)
    assert not big[:, :20].any()
    assert not big[:, 60:].any()


@each_backend("torch", "triton")
def test_g_may_have_any_strides(backend):
    X = torch.randn(30, 40, device=device_of(backend))
    for G in (X.new_zeros(40, 80)[:, ::2], X.new_zeros(40, 41).T[:40], X.new_zeros(40, 40).T):
        torch.testing.assert_close(accumulate_gram(G, X, backend=backend), X.T @ X)


@needs_cpu
def test_the_cpu_wants_rows_of_g_without_gaps():
    X = torch.randn(30, 40)
    with pytest.raises(BackendError, match="strides"):
        accumulate_gram(torch.zeros(40, 80)[:, ::2], X, backend="cpu")
    torch.testing.assert_close(accumulate_gram(torch.zeros(40, 80)[:, ::2], X), X.T @ X)


@given(
    rows=st.integers(0, 60),
    n=st.integers(1, 70),
    scale=st.sampled_from([0.5, 2.0, -4.0]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(["torch", "cpu"] if _native.cpu_missing() is None else ["torch"]),
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


def test_an_unknown_precision_lists_the_known():
    with pytest.raises(ConfigError, match="ieee, tf32x3, tf32, not 'fp8'"):
        accumulate_gram(torch.zeros(4, 4), torch.zeros(2, 4), precision="fp8")


G, X = torch.zeros(4, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("Gs", "Xs", "weights", "error", "match"),
    [
        ([G], [X, X], None, ShapeMismatchError, "1 Grams, 2 X and 1 row_weights"),
        ([G], [X], [None, None], ShapeMismatchError, "1 Grams, 1 X and 2 row_weights"),
        ([G, torch.zeros(3, 3)], [X, X[:, 1:]], None, ShapeMismatchError, "one width, not 4 and 3"),
        ([G, G.clone()], [X, X.half()], None, ConfigError, "float32 on cpu and torch.float16"),
        ([G, G], [X, X], None, ConfigError, "share their memory"),
        ([G, G.clone()], [X, X], [None, torch.ones(3)], ShapeMismatchError, r"\(2,\).*\(3,\)"),
        ([G, G.clone()], [X, X], [None, -torch.ones(2)], ConfigError, "-1.0"),
    ],
)
def test_errors_of_groups(Gs, Xs, weights, error, match):
    with pytest.raises(error, match=match):
        accumulate_grams(Gs, Xs, weights)


@each_gpu_backend("triton")
def test_work_on_a_side_stream_is_in_its_order(backend):
    rows, stream = torch.randn(500, 64, device="cuda"), torch.cuda.Stream()
    X, Gs = torch.zeros_like(rows), [torch.zeros(64, 64, device="cuda") for _ in range(3)]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        fill_late(X, rows)
        accumulate_gram(Gs[0], X, backend=backend)
        accumulate_grams(Gs[1:], [X, X], backend=backend)
    stream.synchronize()
    for G in Gs:
        torch.testing.assert_close(G, rows.T @ rows)


@needs_two_devices
@each_gpu_backend("triton")
def test_on_a_device_that_is_not_the_current(backend):
    X = torch.randn(50, 20, device="cuda:1")
    with torch.cuda.device(0):
        G = accumulate_gram(torch.zeros(20, 20, device="cuda:1"), X, backend=backend)
    torch.testing.assert_close(G, X.T @ X)


@each_gpu_backend("triton")
def test_bits_are_the_same_every_time(backend):
    X = torch.randn(20_000, 200, device="cuda").bfloat16()
    first = accumulate_gram(torch.zeros(200, 200, device="cuda"), X, backend=backend)
    for _ in range(5):
        assert torch.equal(accumulate_gram(torch.zeros(200, 200, device="cuda"), X, backend=backend), first)


@each_gpu_backend("triton")
@pytest.mark.slow
def test_offsets_beyond_32_bits(backend):
    X = torch.zeros(2**17 + 1, 2**14 + 16, device="cuda", dtype=torch.bfloat16)  # 4 GiB, 2**31 elements and more
    X[-1, -40:] = 1
    G = accumulate_gram(torch.zeros(X.shape[1], X.shape[1], device="cuda"), X, backend=backend)
    assert G.sum() == 1600
    assert G[-40:, -40:].sum() == 1600

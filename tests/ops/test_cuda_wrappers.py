"""What the `cuda` backends hand to the compiled module, with the module replaced; and, on a device, its kernels at awkward shapes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bmm_engine.errors import BackendError
from bmm_engine.ops import _dispatch, _native, assemble, cholesky, residual, select, spectral
from bmm_engine.ops.cholesky import blocked
from tests.numerics import assert_as_good_as_torch, assert_backward_stable
from tests.ops.backends import fill_late

single, double, half, brain = torch.float32, torch.float64, torch.float16, torch.bfloat16
DEVICE = torch.device("cuda", 3)


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on DEVICE."""

    @property
    def device(self):
        return DEVICE


def put(*tensors):
    moved = [tensor.as_subclass(OnDevice) for tensor in tensors]
    return moved[0] if len(moved) == 1 else moved


def stream_of(device):
    """One stream per device; none of them is the default stream, whose handle is 0."""
    return SimpleNamespace(cuda_stream=1000 + torch.device(device).index)


STREAM = stream_of(DEVICE).cuda_stream


@pytest.fixture
def native(monkeypatch):
    """Stands in for `_cuda`: a list of (function, arguments)."""
    calls = []

    class Recorder:
        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, arguments))

    monkeypatch.setattr(_native, "cuda", Recorder)
    monkeypatch.setattr(_native, "cuda_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", stream_of)
    return calls


def test_assemble(native):
    first, second = put(torch.randn(2, 5, 5), torch.randn(2, 5, 5, dtype=double))
    out = put(torch.empty(2, 5, 5, dtype=double))
    assert assemble.cuda.supports([first, second], out) is None
    assemble.cuda.assemble([first, second], [0.5, 2.0], [1.0, 3.0], 0.25, out)
    inputs = [(first.data_ptr(), 0), (second.data_ptr(), 1)]
    arguments = (inputs, [0.5, 2.0], [1.0, 3.0], 0.25, out.data_ptr(), 10, 5, 1, 3, STREAM)
    assert native == [("assemble", arguments)]


def test_residual(native):
    anchor, expert = put(torch.randn(3, 4, 6).bfloat16(), torch.randn(3, 4, 8).half()[:, :, 2:])
    gram, out = put(torch.randn(1, 6, 6).expand(3, 6, 6), torch.empty(3, 4, 6))
    assert residual.cuda.supports(anchor, [expert], [gram], out) is None
    residual.cuda.residual(anchor, [expert], [gram], [0.5], out, "tf32")
    matrices = (anchor.data_ptr(), 24, 6, 3), [(expert.data_ptr(), 32, 8, 2)], [(gram.data_ptr(), 0, 6, 0)]
    assert native == [("residual", (*matrices, [0.5], (out.data_ptr(), 24, 6, 0), 3, 4, 6, 3, STREAM))]


def test_residual_of_several_leading_dimensions_and_none(native):
    for leading, members, stride in (((2, 3), 6, 24), ((), 1, 24)):
        anchor, expert, out = put(*(torch.zeros(*leading, 4, 6) for _ in range(3)))
        gram = put(torch.zeros(*leading, 6, 6))
        residual.cuda.residual(anchor, [expert], [gram], [1.0], out, "ieee")
        _, arguments = native.pop()
        assert arguments[0] == (anchor.data_ptr(), stride, 6, 0)
        assert arguments[5:8] == (members, 4, 6)


@pytest.mark.parametrize("base_dtype", [None, half])
def test_spectral(native, base_dtype):
    out, anchor = put(torch.empty(6, 4).bfloat16().T, torch.randn(4, 6))
    base = None if base_dtype is None else put(torch.randn(4, 12).to(base_dtype)[:, ::2])
    projected, vectors = put(torch.randn(4, 6, dtype=double), torch.randn(6, 6, dtype=double).T)
    shrinkage = put(torch.rand(6, dtype=double))
    assert spectral.cuda.supports(out, anchor, projected, vectors, base) is None
    spectral.cuda.apply_spectral(out, anchor, projected, shrinkage, vectors, base, 0.5, "tf32")
    matrices = (
        (out.data_ptr(), 4, 6, 1, 4, 3),
        (anchor.data_ptr(), 4, 6, 6, 1, 0),
        (0, 0, 0, 0, 0, 0) if base is None else (base.data_ptr(), 4, 6, 12, 2, 2),
        (projected.data_ptr(), 4, 6, 6, 1, 1),
    )
    rest = (shrinkage.data_ptr(), (vectors.data_ptr(), 6, 6, 1, 6, 1), 0.5, 3, STREAM)
    assert native == [("apply_spectral", (*matrices, *rest))]


@pytest.mark.parametrize("upper", [None, 77])
def test_select(native, upper):
    x, counts = put(torch.randn(5, 7).half(), torch.zeros(1 << 15 if upper is None else 1 << 16, dtype=torch.int64))
    for view in (x, x.mT):
        assert select.cuda.supports(counts, view) is None
        select.cuda.add_magnitude_histogram(counts, view, upper)
        arguments = (x.data_ptr(), 35, 2, counts.data_ptr(), -1 if upper is None else upper, 3, STREAM)
        assert native.pop() == ("add_magnitude_histogram", arguments)


def test_cholesky_factors_block_after_block(native):
    a = put(torch.eye(70, dtype=double).repeat(2, 1, 1))
    assert cholesky.cuda.supports(a) is None
    lower, info = cholesky.cuda.cholesky_(a)
    assert (lower.data_ptr(), lower.shape, info.shape) == (a.data_ptr(), a.shape, (2,))
    assert [name for name, _ in native] == ["cholesky_factor"] * 2
    for (_, arguments), start, width in zip(native, (0, 64), (64, 6)):
        source, target, inverse, info_address, offset, *common = arguments
        assert source[1:] == (70 * 64, 64), "the block column's workspace"
        assert target == (a.data_ptr() + (start * 70 + start) * 8, 70 * 70, 70)
        assert inverse[1:] == (64 * 64, 64)
        assert (info_address, offset) == (info.data_ptr(), start)
        assert common == [2, width, 1, 3, STREAM]


def test_cholesky_inverts_all_diagonal_blocks_at_once(native):
    lower, rhs = put(torch.eye(300).repeat(2, 1, 1), torch.randn(2, 4, 300))
    assert cholesky.cuda.solve_right(lower, rhs).shape == (2, 4, 300)
    ((name, (source, inverse, *common)),) = native
    assert name == "cholesky_invert"
    assert source[1:] == inverse[1:] == (257 * 256, 256)
    assert common == [4, 256, 0, 3, STREAM], "two members of two panels each"


def test_cholesky_blocks_are_the_kernels():
    header = Path(__file__).parents[2] / "csrc" / "cuda" / "cholesky.cuh"
    if not header.is_file():
        pytest.skip("the C++ sources are not beside the tests")
    assert int(re.search(r"kCholeskyBlock = (\d+)", header.read_text())[1]) == blocked.BLOCK


square = torch.zeros(4, 4)
column_major = torch.zeros(2, 4, 4).mT


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: assemble.cuda.supports([square], square), "on cpu"),
        (lambda: assemble.cuda.supports([put(square.repeat(1, 2)[:, ::2])], put(square)), "not contiguous"),
        (lambda: residual.cuda.supports(square, [square], [square], square), "on cpu"),
        (
            lambda: residual.cuda.supports(put(square), [square], [column_major[0]], square),
            r"rows of every matrix.*\(1, 4\)",
        ),
        (lambda: residual.cuda.supports(put(torch.zeros(4, 3, 2, 5)[:, :1]), [], [], put(square)), None),
        (lambda: residual.cuda.supports(put(torch.zeros(4, 3, 2, 5)[:, ::2]), [], [], put(square)), "leading"),
        (lambda: spectral.cuda.supports(square, square, square, square, None), "on cpu"),
        (lambda: spectral.cuda.supports(put(square), square, square.T, square, None), "projected"),
        (
            lambda: spectral.cuda.supports(put(square), square, square, torch.zeros(4, 8)[:, ::2], None),
            r"eigenvectors.*\(8, 2\)",
        ),
        (lambda: select.cuda.supports(square, square), "on cpu"),
        (lambda: select.cuda.supports(put(square), put(torch.zeros(8)[::2])), "contiguous"),
        (lambda: cholesky.cuda.supports(square), "on cpu"),
        (lambda: cholesky.cuda.supports(put(column_major)), r"row-major.*\(16, 1, 4\)"),
        (lambda: cholesky.cuda.supports(put(torch.empty(1, 1).expand(1025, 1025))), "row-major"),
    ],
)
@pytest.mark.usefixtures("native")
def test_reasons(call, reason):
    got = call()
    assert (got is None) if reason is None else re.search(reason, got)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("leading", "width", "reason"),
    [
        ((), 1024, None),
        ((1,), 1025, "a single matrix of width 1025 .* beyond 1024"),
        ((2,), 4096, None),
        ((2, 2), 4097, "a batch of width 4097 .* beyond 4096"),
    ],
)
def test_large_matrices_are_left_to_torch(leading, width, reason):
    class Large(OnDevice):
        shape = property(lambda self: torch.Size((*leading, width, width)))

        def is_contiguous(self):
            return True

    got = cholesky.cuda.supports(torch.zeros(1).as_subclass(Large))
    assert (got is None) if reason is None else re.search(reason, got)


def test_a_missing_module_is_the_reason(monkeypatch):
    monkeypatch.setattr(_native, "cuda_missing", lambda: "no driver")
    x = put(square)
    for reason in (
        assemble.cuda.supports([x], x),
        residual.cuda.supports(x, [x], [x], x),
        spectral.cuda.supports(x, x, x, x, None),
        select.cuda.supports(x, x),
        cholesky.cuda.supports(x),
    ):
        assert reason == "no driver"


@pytest.mark.skipif(_native._load("_cuda")[0] is None, reason="bmm_engine._cuda is not built")
def test_native_errors_carry_file_line_and_values():
    native = _native.cuda()
    matrix, squares = (16, 4, 4, 4, 1, 0), (16, 4096, 64)
    for match, function, *arguments in (
        (r"^cuda/assemble.cu:\d+: .* 1 inputs, 2 weights", native.assemble, [(16, 0)], [1, 2], [0], 1, 16, 4, 4, 0),
        ("2 ridges for 1 matrices", native.assemble, [(16, 0)], [1], [0, 1], 1, 16, 4, 4, 0),
        ("Gram is 3", native.residual, (16, 0, 4, 0), [(16, 0, 4, 0)], [(16, 0, 4, 3)], [1], (16, 0, 4, 0), 1, 4, 4),
        ("1 experts, 0 Grams", native.residual, (16, 0, 4, 0), [(16, 0, 4, 0)], [], [1], (16, 0, 4, 0), 1, 4, 4),
        ("4 x 3 for out 4 x 4", native.apply_spectral, matrix, matrix, (0,) * 6, (16, 4, 3, 3, 1, 0), 16, matrix, 1.0),
        ("width is 65", native.cholesky_factor, squares, squares, squares, 16, 0, 1, 65, 0),
        ("dtype code is 2", native.cholesky_invert, squares, squares, 1, 64, 2),
        ("upper is 40000", native.add_magnitude_histogram, 16, 5, 0, 16, 40000),
        ("null pointer for 5 elements", native.add_magnitude_histogram, 0, 5, 0, 16, -1),
    ):
        with pytest.raises(native.Error, match=match):
            function(*arguments, 0, 0)


# On a device. Each kernel runs twice, on a stream of its own, after an input that arrives late there.


def late_and_twice(run, late, *outs):
    """`run(*outs)` on a side stream; its results, the same bits both times. `late` is filled on that stream first."""
    values, stream = late.clone(), torch.cuda.Stream()
    late.zero_()
    copies = [[out.clone() for out in outs] for _ in range(2)]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        fill_late(late, values)
        for one in copies:
            run(*one)
    stream.synchronize()
    for first, second in zip(*copies):
        assert torch.equal(first, second)
    return copies[0]


def poisoned(shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def random(shape, dtype):
    return torch.randn(shape, dtype=double).to("cuda", dtype)


def shapes_of(named):
    """Parametrises `shape`; bench/gpu.sh picks some by these names for the sanitizers."""
    return pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in named.items()])


# Products in large tiles (the first two) and small ones.
TILES = {
    "large": (2048, 1536),
    "large-ragged": (2049, 1537),
    "whole": (256, 64),
    "ragged": (130, 203),
    "one row": (1, 5),
    "one column": (3, 1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [single, double])
@pytest.mark.parametrize("dtypes", [[single] * 8, [double] * 3, [single, double, double] * 13], ids=len)
@shapes_of(
    {
        "large": (768, 768),
        "large-ragged": (769, 769),
        "batch": (12, 130, 130),
        "ragged batch": (5, 131, 131),
        "more members than one launch takes": (300, 3, 3),
        "one entry": (1, 1),
    }
)
def test_assemble_kernel(shape, dtypes, out_dtype):
    grams = [random(shape, dtype) for dtype in dtypes]
    members = torch.Size(shape[:-2]).numel()
    call = (torch.rand(len(grams)).tolist(), torch.rand(members).tolist(), 0.25)
    truth, same_dtype = poisoned(shape, double), poisoned(shape, out_dtype)
    assemble.reference.assemble(grams, *call, truth)
    assemble.reference.assemble(grams, *call, same_dtype)

    def run(out):
        assemble.cuda.assemble(grams, *call, out)

    (got,) = late_and_twice(run, grams[0], poisoned(shape, out_dtype))
    assert_as_good_as_torch(got, same_dtype, truth)


@pytest.mark.gpu
def test_assemble_kernel_in_place_of_a_gram_of_a_later_pass():
    grams = [random((50, 50), single) for _ in range(40)]
    truth = poisoned((50, 50), double)
    assemble.reference.assemble(grams, [1.0] * 40, [0.5], 0.5, truth)
    assemble.cuda.assemble(grams, [1.0] * 40, [0.5], 0.5, grams[35])
    torch.testing.assert_close(grams[35].double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [single, double])
@pytest.mark.parametrize("gram_dtypes", [[single], [double], [single, double]], ids=str)
@pytest.mark.parametrize("dtypes", [(single, [single] * 2), (brain, [brain, half, double]), (double, [brain])], ids=str)
@shapes_of(TILES | {"batch": (6, 70, 36)})
def test_residual_kernel(shape, dtypes, gram_dtypes, out_dtype):
    square = (*shape[:-2], shape[-1], shape[-1])
    anchor, experts = random(shape, dtypes[0]), [random(shape, dtype) for dtype in dtypes[1]]
    grams = [random(square, gram_dtypes[t % len(gram_dtypes)]) for t in range(len(experts))]
    weights = torch.rand(len(experts)).add(0.1).tolist()
    truth, same_dtype = poisoned(shape, double), poisoned(shape, out_dtype)
    residual.reference.residual(anchor, experts, grams, weights, truth, "ieee")
    residual.reference.residual(anchor, experts, grams, weights, same_dtype, "ieee")

    def run(out):
        residual.cuda.residual(anchor, experts, grams, weights, out, "ieee")

    (got,) = late_and_twice(run, grams[-1], poisoned(shape, out_dtype))
    assert_as_good_as_torch(got, same_dtype, truth)


@pytest.mark.gpu
def test_residual_kernel_of_more_experts_than_one_pass_takes_on_strided_rows():
    anchor = random((200, 210), brain)[:, 3:203]
    experts = [random((400, 201), single)[::2, 1:] for _ in range(19)]
    grams = [random((200, 208), single)[:, :200] for _ in range(19)]
    weights = torch.rand(19).tolist()
    truth, same_dtype, got = poisoned((200, 200), double), poisoned((200, 200), single), poisoned((200, 200), single)
    residual.reference.residual(anchor, experts, grams, weights, truth, "ieee")
    residual.reference.residual(anchor, experts, grams, weights, same_dtype, "ieee")
    residual.cuda.residual(anchor, experts, grams, weights, got, "ieee")
    assert_as_good_as_torch(got, same_dtype, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("vectors_as", ["rows", "columns"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "out_dtype", "anchor_dtype", "base_dtype"),
    [
        (single, single, single, None),
        (single, brain, brain, half),
        (double, half, single, double),
        (double, double, brain, None),
        (double, brain, double, brain),
    ],
)
@shapes_of(TILES)
def test_spectral_kernel(shape, dtype, out_dtype, anchor_dtype, base_dtype, transposed, vectors_as):
    rows, cols = shape
    anchor, projected = random(shape, anchor_dtype), random(shape, dtype)
    base = None if base_dtype is None else random((rows, 2 * cols), base_dtype)[:, ::2]
    scale = 1.0 if base is None else 0.3
    vectors, shrinkage = random((cols, cols), dtype), random((cols,), dtype)
    vectors = vectors if vectors_as == "rows" else vectors.T.contiguous().T
    out = poisoned((cols, rows), out_dtype).T if transposed else poisoned(shape, out_dtype)
    truth, same_dtype = poisoned(shape, double), poisoned(shape, out_dtype)
    wide = (projected.double(), shrinkage.double(), vectors.double())
    spectral.reference.apply_spectral(truth, anchor, *wide, base, scale, "ieee")
    spectral.reference.apply_spectral(same_dtype, anchor, projected, shrinkage, vectors, base, scale, "ieee")

    def run(got):
        spectral.cuda.apply_spectral(got, anchor, projected, shrinkage, vectors, base, scale, "ieee")

    (got,) = late_and_twice(run, projected, out)
    assert_as_good_as_torch(got, same_dtype, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [single, double])
@pytest.mark.parametrize("n", [pytest.param(5, id="less than a block"), 64, pytest.param(300, id="ragged")])
def test_cholesky_kernels(dtype, n):
    x = random((4, n, n), double)
    a = (x @ x.mT / n + torch.eye(n, device="cuda", dtype=double)).to(dtype)
    a = (a + a.mT) / 2
    rhs, out = random((4, 30, n), dtype), poisoned((4, 30, n), dtype)

    def run(got):
        lower, info = cholesky.cuda.cholesky_(a.clone())
        got.copy_(cholesky.cuda.solve_right(lower, rhs))
        got[:, 0].add_(info[:, None].to(dtype))  # a failure shows

    (got,) = late_and_twice(run, a, out)
    for member in range(4):
        assert_backward_stable(got[member].cpu(), a[member].cpu(), rhs[member].cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [single, double])
def test_the_self_checks_pass(dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    assert cholesky._self_check(cholesky.cuda, device, dtype) is None
    assert select._self_check(select.cuda, device, dtype) is None


@pytest.mark.gpu
def test_auto_takes_the_kernels(monkeypatch, caplog):
    monkeypatch.setattr(_dispatch, "_announced", set())
    caplog.set_level("INFO", logger="bmm_engine")
    cholesky.cholesky_(torch.eye(64, device="cuda", dtype=double).repeat(3, 1, 1))
    select.kth_largest_magnitude(torch.ones(5, device="cuda"), 1)
    assert {"cholesky: backend 'cuda' on cuda", "select: backend 'cuda' on cuda"} <= set(caplog.messages)
    with pytest.raises(BackendError, match="a single matrix of width 2000"):
        cholesky.cholesky_(torch.zeros(2000, 2000, device="cuda"), backend="cuda")

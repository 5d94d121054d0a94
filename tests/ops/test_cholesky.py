from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import BackendError, ConfigError, ShapeMismatchError
from bmm_engine.ops import cholesky
from bmm_engine.ops.cholesky import blocked, cholesky_, solve_right
from tests.numerics import assert_backward_stable, relative_error

DTYPES = [torch.float32, torch.float64]
NAN = float("nan")


def factor_diagonal(source, target, inverse, info, offset):
    """What csrc/cuda/cholesky.cuh does, member by member, in torch."""
    width = source.shape[-1]
    lower, failed = torch.linalg.cholesky_ex(source.tril() + source.tril(-1).mT)
    for member in range(len(source)):
        if info[member]:
            continue
        if failed[member]:
            info[member] = offset + failed[member]
            continue
        target[member] = lower[member] + target[member].triu(1)
        eye = torch.eye(width, dtype=source.dtype)
        inverse[member] = torch.linalg.solve_triangular(lower[member], eye, upper=False)


def invert_diagonal(lower, inverse):
    for start in range(0, lower.shape[-1], blocked.BLOCK):
        block = lower[:, start : start + blocked.BLOCK, start : start + blocked.BLOCK].tril()
        eye = torch.eye(block.shape[-1], dtype=lower.dtype)
        inverse[:, start : start + blocked.BLOCK, start : start + blocked.BLOCK] = torch.linalg.solve_triangular(
            block, eye, upper=False
        )


# The CUDA backend's algorithm, with its kernel replaced.
on_torch = SimpleNamespace(
    cholesky_=lambda a: blocked.cholesky_(a, factor_diagonal),
    solve_right=lambda lower, rhs: blocked.solve_right(lower, rhs, invert_diagonal),
)
IMPLEMENTATIONS = {"torch": cholesky.reference, "blocked": on_torch, "cuda": cholesky.cuda}
each = pytest.mark.parametrize("name", ["torch", "blocked", pytest.param("cuda", marks=pytest.mark.gpu)])


def device_of(name):
    return "cuda" if name == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def _poisoned_new_empty(monkeypatch):
    """Workspace comes as NaN: what is read before it is written shows."""
    original = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: original(*args, **kwargs).fill_(NAN))


def positive(batch, n, dtype=torch.float64, condition=1e3):
    """Symmetric positive definite members with eigenvalues from 1 to 1 / condition."""
    vectors = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64))[0]
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    a = (vectors * values) @ vectors.mT
    return ((a + a.mT) / 2).to(dtype)


def check(name, a, rows=7):
    """Factors `a`, solves with it, and asserts that both are as exact as substitution is."""
    implementation, device = IMPLEMENTATIONS[name], device_of(name)
    work = a.to(device, copy=True)
    lower, info = implementation.cholesky_(work)
    assert info.dtype == torch.int32
    assert info.tolist() == [0] * len(a)
    assert lower.data_ptr() == work.data_ptr()
    assert torch.equal(lower, lower.tril()), "zeros above the diagonal"
    # Of the size of A and of its inverse: both ends of the spectrum count.
    rhs = torch.cat([torch.randn(len(a), rows, a.shape[-1], dtype=torch.float64) @ a.double(), a.double()[:, :3]], 1)
    rhs = rhs.to(a.dtype)
    solved = implementation.solve_right(lower, rhs.to(device))
    assert solved.shape == rhs.shape
    for member in range(len(a)):
        own = lower[member].cpu()
        assert_backward_stable(own, own.mT, a[member])
        assert_backward_stable(solved[member].cpu(), a[member], rhs[member])
    return lower, solved


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 130, 256, 257, 330])
def test_factors_and_solves(name, dtype, n):
    check(name, positive(3, n, dtype))


@each
@pytest.mark.parametrize("batch", [1, 5])
def test_batches(name, batch):
    check(name, positive(batch, 100))


@each
@pytest.mark.parametrize(
    ("dtype", "condition"),
    [(torch.float32, 1e1), (torch.float32, 1e5), (torch.float64, 1e6), (torch.float64, 1e10), (torch.float64, 1e13)],
)
def test_backward_error_does_not_grow_with_the_condition(name, dtype, condition):
    check(name, positive(2, 300, dtype, condition))


@each
@pytest.mark.parametrize(("dtype", "ridge"), [(torch.float32, 1e-3), (torch.float64, 1e-3), (torch.float64, 1e-11)])
def test_singular_grams_with_a_small_ridge(name, dtype, ridge):
    rows = torch.randn(2, 20, 200, dtype=torch.float64)
    a = rows.mT @ rows / 200
    a.diagonal(dim1=1, dim2=2).add_(ridge * a.diagonal(dim1=1, dim2=2).mean())
    check(name, a.to(dtype))


@each
def test_twice_gives_the_same_bits(name):
    a = positive(2, 200, torch.float32)
    for first, second in zip(check(name, a)[:1], check(name, a)[:1]):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_and_failing_minor_of_small_blocks(monkeypatch, dtype):
    """Blocks of 4 in panels of 16: all the edges there are, quickly."""
    monkeypatch.setattr(blocked, "BLOCK", 4)
    monkeypatch.setattr(blocked, "PANEL", 16)
    for n in range(1, 42):
        a = positive(2, n, dtype)
        lower, _ = check("blocked", a, rows=2)
        for minor in range(1, n + 1):
            bad = a.clone()
            bad[0, minor - 1, minor - 1] = -1
            got, info = on_torch.cholesky_(bad)
            assert info.tolist() == [minor, 0]
            assert torch.equal(got[1], lower[1])


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-3.0, NAN, 0.0])
@pytest.mark.parametrize("minor", [1, 2, 16, 17, 33, 64, 65, 128, 129, 256, 257, 300])
def test_info_is_the_first_minor_that_fails(name, dtype, value, minor):
    implementation, device = IMPLEMENTATIONS[name], device_of(name)
    a = positive(3, 300, dtype) if value else torch.eye(300, dtype=dtype).repeat(3, 1, 1)
    whole, _ = implementation.cholesky_(a.to(device, copy=True))
    a[1, minor - 1, minor - 1] = value
    a[1, 299, 299] = NAN  # a later failure does not hide the first
    lower, info = implementation.cholesky_(a.to(device))
    assert info.tolist() == [0, minor, 0]
    for good in (0, 2):
        assert torch.equal(lower[good], whole[good]), "a member that fails disturbs no other"


@each
def test_members_fail_each_for_itself(name):
    a = positive(5, 150)
    for member, pivot in ((0, 0), (2, 149), (3, 64)):
        a[member, pivot, pivot] = -1
    _, info = IMPLEMENTATIONS[name].cholesky_(a.to(device_of(name)))
    assert info.tolist() == [1, 0, 150, 65, 0]


@each
def test_nothing_above_the_diagonal_is_read_by_a_solve(name):
    implementation, device = IMPLEMENTATIONS[name], device_of(name)
    a, rhs = positive(2, 290).to(device), torch.randn(2, 3, 290, dtype=torch.float64).to(device)
    lower, _ = implementation.cholesky_(a)
    above = torch.full_like(lower, NAN).triu_(1)
    assert torch.equal(implementation.solve_right(lower + above, rhs), implementation.solve_right(lower, rhs))


@each
@pytest.mark.parametrize("view", ["rows", "columns", "transposed"])
def test_strided_right_hand_sides_are_left_as_they_are(name, view):
    implementation, device = IMPLEMENTATIONS[name], device_of(name)
    lower, _ = implementation.cholesky_(positive(2, 70).to(device))
    rhs = torch.randn(2, 70, 140, dtype=torch.float64).to(device)
    rhs = {"rows": rhs[:, ::7, :70], "columns": rhs[:, :9, ::2], "transposed": rhs[:, :, :5].mT}[view]
    before = rhs.clone()
    assert relative_error(implementation.solve_right(lower, rhs), implementation.solve_right(lower, before)) < 1e-13
    assert torch.equal(rhs, before)


@pytest.mark.parametrize("backend", ["torch", "auto", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0)])
def test_leading_dimensions(backend, leading):
    device = device_of(backend)
    a = positive(max(1, torch.Size(leading).numel()), 40)[: torch.Size(leading).numel()].reshape(*leading, 40, 40)
    rhs = torch.randn(*leading, 6, 40, dtype=torch.float64)
    lower, info = cholesky_(a.to(device, copy=True), backend=backend)
    assert lower.shape == a.shape
    assert info.shape == leading
    assert not info.any()
    solved = solve_right(lower, rhs.to(device), backend=backend)
    assert relative_error((solved.cpu() @ a), rhs) < 1e-10


@pytest.mark.parametrize("shape", [(3, 0, 0), (0, 5, 5)])
def test_empty(shape):
    lower, info = cholesky_(torch.zeros(shape))
    assert lower.shape == shape
    assert info.tolist() == [0] * shape[0]
    assert solve_right(torch.eye(4), torch.zeros(0, 4)).shape == (0, 4)


@given(n=st.integers(1, 90), batch=st.integers(1, 3), rows=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_laws_of_the_blocked_algorithm(n, batch, rows, seed):
    torch.manual_seed(seed)
    a = positive(batch, n)
    lower, _ = on_torch.cholesky_(a.clone())
    rhs = torch.randn(batch, rows, n, dtype=torch.float64)
    solved = on_torch.solve_right(lower, rhs)
    assert relative_error(on_torch.solve_right(lower, 2 * rhs), 2 * solved) == 0
    assert relative_error(lower, torch.linalg.cholesky(a)) < 1e-9
    assert relative_error(on_torch.cholesky_(4 * a)[0], 2 * lower) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_check_finds_what_is_wrong(dtype):
    def broken(**changes):
        return SimpleNamespace(**{**vars(on_torch), **changes})

    def one_entry_off(a):
        lower, info = on_torch.cholesky_(a)
        lower[:, 130, 70] *= 1.01
        return lower, info

    def wrong_info(a):
        lower, info = on_torch.cholesky_(a)
        return lower, info + (info > 0)

    cpu = torch.device("cpu")
    assert cholesky._self_check(on_torch, cpu, dtype) is None
    assert "differs from torch" in cholesky._self_check(broken(cholesky_=one_entry_off), cpu, dtype)
    assert "[0, 151, 0]" in cholesky._self_check(broken(cholesky_=wrong_info), cpu, dtype)
    forgetful = broken(solve_right=lambda lower, rhs: on_torch.solve_right(lower, rhs) * 1.001)
    assert "differs from torch" in cholesky._self_check(forgetful, cpu, dtype)


def test_takes_arrays_of_other_libraries():
    a, rhs = positive(2, 10), torch.randn(2, 3, 10, dtype=torch.float64)
    expected = solve_right(cholesky_(a.clone())[0], rhs)
    lower, _ = cholesky_(array := a.numpy())
    assert lower.data_ptr() == array.ctypes.data
    assert torch.equal(solve_right(lower, rhs.numpy()), expected)


def test_auto_is_torch_on_the_cpu():
    a = positive(2, 10)
    lower, _ = cholesky_(a.clone())
    assert torch.equal(lower, cholesky.reference.cholesky_(a)[0])
    with pytest.raises(BackendError, match="backend 'cuda' cannot run"):
        cholesky_(positive(2, 10), backend="cuda")


eye = torch.eye(3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: cholesky_(torch.zeros(2, 3)), ShapeMismatchError, r"a must be .* is \(2, 3\)"),
        (lambda: cholesky_(torch.zeros(3)), ShapeMismatchError, r"\(3,\)"),
        (lambda: cholesky_(eye.half()), ConfigError, "float16"),
        (lambda: cholesky_(torch.zeros(3, 6)[:, ::2]), ConfigError, r"contiguous.*\(6, 2\)"),
        (lambda: cholesky_(eye, backend="lapack"), ConfigError, "lapack"),
        (lambda: solve_right(torch.zeros(2, 3), eye), ShapeMismatchError, r"lower must be"),
        (lambda: solve_right(eye, torch.zeros(2, 4)), ShapeMismatchError, r"\(3, 3\), and is \(2, 4\)"),
        (lambda: solve_right(eye, torch.zeros(2, 2, 3)), ShapeMismatchError, r"\(2, 2, 3\)"),
        (lambda: solve_right(eye.repeat(2, 1, 1), torch.zeros(3, 2, 3)), ShapeMismatchError, r"\(3, 2, 3\)"),
        (lambda: solve_right(eye, torch.zeros(2, 3, dtype=torch.float64)), ConfigError, "float64"),
        (lambda: solve_right(eye, torch.zeros(2, 3, device="meta")), ConfigError, "meta"),
    ],
)
def test_errors_name_the_values(call, error, match):
    with pytest.raises(error, match=match):
        call()

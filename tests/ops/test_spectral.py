from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import BackendError, ConfigError, ShapeMismatchError
from bmm_engine.ops import _native
from bmm_engine.ops.spectral import apply_spectral
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
# out, anchor, base, B and Q
DTYPES = [
    (single, single, single, single),
    (brain, brain, brain, single),
    (half, brain, single, single),
    (double, half, double, single),
    (double, double, double, double),
    (brain, single, half, double),
]
SHAPES = [(64, 64), (70, 133), (1, 1), (5, 1), (3, 40), (150, 20)]
TRITON_SHAPES = [(32, 32), (40, 70), (5, 1)] if INTERPRETED else [*SHAPES, (700, 530)]

each = each_backend("torch", "cpu", "cuda", "triton")
each_shape = each_backend_and("shape", {"torch": SHAPES, "cpu": SHAPES, "cuda": TRITON_SHAPES, "triton": TRITON_SHAPES})


class Problem:
    """A module whose regression has the eigenvalues `e`."""

    def __init__(self, shape, dtypes=DTYPES[0], device="cpu"):
        self.out_dtype, of_anchor, of_base, dtype = dtypes
        self.shape, self.device, n = shape, device, shape[1]
        self.anchor, self.base = (torch.randn(shape).to(kind).to(device) for kind in (of_anchor, of_base))
        self.residual = torch.randn(shape, dtype=double)
        self.Q = torch.linalg.qr(torch.randn(n, n, dtype=double))[0]
        self.e = torch.rand(n, dtype=double) * 3
        self.spectral = [tensor.to(dtype).to(device) for tensor in (self.residual @ self.Q, self.Q, self.e)]

    def out(self):
        return torch.empty(self.shape, dtype=self.out_dtype, device=self.device)

    def apply(self, ridge, backend, out=None, scale=1.0, **options):
        out = self.out() if out is None else out
        options = {"base": self.base, "scale": scale, "backend": backend, **options}
        return apply_spectral(out, self.anchor, *self.spectral, ridge, **options)

    def definition(self, ridge, scale=1.0, signs=False):
        """From the tensors as they were rounded; `signs`: of the magnitudes of all factors."""
        B, Q, e = (tensor.double() for tensor in self.spectral)
        anchor, base = self.anchor.double(), self.base.double()
        if signs:
            B, Q = B.abs(), Q.abs()
            return anchor.abs() * scale + (B * (scale / (e.clamp(min=0) + ridge))) @ Q.T
        solution = anchor + (B / (e.clamp(min=0) + ridge)) @ Q.T
        return base + scale * (solution - base)


@each_shape
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_equals_the_definition(backend, dtypes, shape, scale):
    if backend == "triton" and dtypes[-1] == torch.float64:
        return  # see test_float64_is_not_for_triton
    problem = Problem(shape, dtypes, device_of(backend))
    truth = problem.definition(0.2, scale)
    result, same_dtype = problem.apply(0.2, backend, scale=scale), problem.apply(0.2, "torch", scale=scale)
    if dtypes == DTYPES[3]:  # rounded to the dtype of B on the way to a wider one
        result, same_dtype = result.float(), same_dtype.float()
    if dtypes[0] == dtypes[-1] == double:
        assert (result - truth).abs().max() <= 1e-13 * (1 + truth.abs().max())
    else:
        assert_as_good_as_torch(result, same_dtype, truth)


@each
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[4]], ids=str)
def test_factors_in_the_place_of_a_ridge(backend, dtypes):
    if backend == "triton" and dtypes[-1] == torch.float64:
        return
    problem = Problem((40, 70), dtypes, device_of(backend))
    factors = torch.rand(70, dtype=double, device=problem.device)
    factors[::3] = 0

    def apply(backend, factors, **options):
        options = options or {"base": problem.base, "scale": -0.7}
        given = (problem.out(), problem.anchor, *problem.spectral[:2])
        return apply_spectral(*given, factors=factors, backend=backend, **options)

    B, Q, e = (tensor.double() for tensor in problem.spectral)
    anchor, base = problem.anchor.double(), problem.base.double()
    truth = base - 0.7 * (anchor + (B * factors) @ Q.T - base)
    result = apply(backend, factors)
    if dtypes[0] == double:
        assert (result - truth).abs().max() <= 1e-13 * (1 + truth.abs().max())
    else:
        assert_as_good_as_torch(result, apply("torch", factors), truth)
    tikhonov = apply(backend, 1 / (e.clamp(min=0) + 0.2))
    torch.testing.assert_close(tikhonov, problem.apply(0.2, backend, scale=-0.7))
    assert torch.equal(apply(backend, torch.zeros_like(factors), scale=1.0), problem.anchor.to(dtypes[0]))


@each
def test_it_solves_the_regression(backend):
    problem = Problem((30, 20), device=device_of(backend))
    A = problem.Q @ torch.diag(problem.e) @ problem.Q.T
    for ridge in (0.01, 1.0, 1e3):
        solved = torch.linalg.solve(A + ridge * torch.eye(20, dtype=double), problem.residual, left=False)
        expected = problem.anchor.double().cpu() + solved
        torch.testing.assert_close(problem.apply(ridge, backend).double().cpu(), expected, rtol=1e-4, atol=1e-4)


@each
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_precision(backend, precision):
    problem = Problem((20, 70) if backend == "triton" and INTERPRETED else (150, 200), device=device_of(backend))
    result = problem.apply(0.2, backend, precision=precision)
    truth, magnitude = problem.definition(0.2), problem.definition(0.2, signs=True)
    assert_as_precise(result, problem.apply(0.2, "torch"), truth, magnitude, precision)


@each
@pytest.mark.parametrize("dtype", [single, brain])
def test_out_may_have_any_strides(backend, dtype):
    problem = Problem((40, 33), (dtype, dtype, dtype, single), device_of(backend))
    truth, same_dtype = problem.definition(0.2), problem.apply(0.2, "torch")
    whole = torch.zeros(41, 80, dtype=dtype, device=problem.device)
    windows = [torch.empty(33, 40, dtype=dtype, device=problem.device).T, whole[1:, 5:38], whole.T[:40, :33]]
    for out in windows:
        whole.zero_()
        assert problem.apply(0.2, backend, out) is out
        assert_as_good_as_torch(out, same_dtype, truth)
        if out._base is whole:
            out.zero_()
            assert not whole.any(), "something was written beside out"


@each
def test_inputs_may_have_any_strides(backend):
    problem = Problem((40, 33), device=device_of(backend))
    truth, same_dtype = problem.definition(0.2, 0.5), problem.apply(0.2, "torch", scale=0.5)
    problem.anchor, problem.base = problem.anchor.T.contiguous().T, problem.base.repeat(1, 2)[:, :33]
    B, Q, e = problem.spectral
    problem.spectral = [B.T.contiguous().T, Q.T.contiguous().T, e.repeat_interleave(2)[::2]]
    if backend == "cuda":
        with pytest.raises(BackendError, match="gaps"):
            problem.apply(0.2, backend, scale=0.5)
        backend = "auto"
    result = problem.apply(0.2, backend, scale=0.5)
    assert_as_good_as_torch(result, same_dtype, truth)


@each
def test_out_may_be_the_anchor_or_the_base(backend):
    problem = Problem((40, 33), device=device_of(backend))
    expected = problem.apply(0.2, backend, scale=0.5)
    for name in ("anchor", "base"):
        before = getattr(problem, name).clone()
        assert torch.equal(problem.apply(0.2, backend, getattr(problem, name), scale=0.5), expected)
        setattr(problem, name, before)


@each
def test_out_may_be_a_parameter(backend):
    problem = Problem((6, 5), device=device_of(backend))
    parameter = torch.nn.Parameter(torch.zeros(6, 5, device=problem.device))
    problem.apply(0.2, backend, parameter)
    assert torch.equal(parameter, problem.apply(0.2, backend))
    assert parameter.is_leaf
    assert parameter.grad is None


@each
def test_an_infinite_ridge_gives_the_anchor(backend):
    problem = Problem((6, 5), DTYPES[1], device_of(backend))
    assert torch.equal(problem.apply(math.inf, backend), problem.anchor)


@each
def test_a_scale_of_zero_gives_the_base(backend):
    problem = Problem((6, 5), DTYPES[1], device_of(backend))
    assert torch.equal(problem.apply(0.2, backend, scale=0.0), problem.base)


@each
def test_without_scale_the_base_is_not_read(backend):
    problem = Problem((6, 5), device=device_of(backend))
    expected = problem.apply(0.2, backend)
    assert torch.equal(problem.apply(0.2, backend, base=None), expected)
    assert torch.equal(problem.apply(0.2, backend, base=torch.full_like(problem.base, math.nan)), expected)
    assert torch.equal(problem.apply(0.2, backend, base=torch.zeros(1, 2)), expected)


@each
def test_no_ridge_and_no_eigenvalue_moves_nothing(backend):
    problem = Problem((6, 4), device=device_of(backend))
    B, Q, _ = problem.spectral
    for nothing in (0.0, -1e-9, 1e-45):
        problem.spectral = [B.clone(), Q, torch.tensor([2.0, nothing, 1.0, nothing], device=problem.device)]
        problem.spectral[0][:, 1::2] = 0  # as B = R Q is there
        kept = (B[:, ::2] / torch.tensor([2.0, 1.0], device=B.device)) @ Q[:, ::2].T
        torch.testing.assert_close(problem.apply(0.0, backend), problem.anchor + kept)
    problem.spectral = [B, Q, torch.zeros(4, device=problem.device)]
    assert torch.equal(problem.apply(0.0, backend), problem.anchor)


@each
def test_negative_eigenvalues_count_as_zero(backend):
    problem = Problem((6, 4), device=device_of(backend))
    B, Q, _ = problem.spectral
    problem.spectral = [B, Q, torch.tensor([1.0, -1e-3, -5.0, 2.0], device=problem.device)]
    result = problem.apply(0.5, backend)
    problem.spectral[2] = torch.tensor([1.0, 0.0, 0.0, 2.0], device=problem.device)
    assert torch.equal(result, problem.apply(0.5, backend))


@each
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty(backend, shape):
    assert Problem(shape, device=device_of(backend)).apply(1.0, backend).shape == shape


@needs_cpu
@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[4]], ids=str)
def test_bits_do_not_depend_on_threads(dtypes):
    problem, results = Problem((150, 170), dtypes), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(problem.apply(0.1, "cpu", scale=0.5))
    assert all(torch.equal(results[0], other) for other in results[1:])


@each_backend("triton")
def test_float64_is_not_for_triton(backend):
    problem = Problem((3, 4), DTYPES[-1], device_of(backend))
    with pytest.raises(BackendError, match="float64"):
        problem.apply(1.0, backend)
    problem.apply(1.0, "auto")


@given(
    rows=st.integers(1, 20),
    n=st.integers(1, 20),
    ridge=st.floats(0.01, 100),
    scale=st.floats(-2, 2),
    seed=st.integers(0, 2**31),
    backend=st.sampled_from(["torch", "cpu"] if _native.cpu_missing() is None else ["torch"]),
)
def test_laws(rows, n, ridge, scale, seed, backend):
    torch.manual_seed(seed)
    problem = Problem((rows, n), DTYPES[4])
    full = problem.apply(ridge, backend)
    close = {"rtol": 1e-9, "atol": 1e-9 * (1 + full.abs().max().item())}
    blended = problem.base + scale * (full - problem.base)
    torch.testing.assert_close(problem.apply(ridge, backend, scale=scale), blended, **close)
    # a larger ridge stays nearer to the anchor
    farther = problem.apply(2 * ridge, backend) - problem.anchor
    assert farther.norm() <= (full - problem.anchor).norm() * (1 + 1e-9)
    # the signs of the eigenvectors do not matter
    signs = torch.randint(0, 2, (n,)).double() * 2 - 1
    problem.spectral = [problem.spectral[0] * signs, problem.spectral[1] * signs, problem.spectral[2]]
    torch.testing.assert_close(problem.apply(ridge, backend), full, **close)


def call(**changes):
    arguments = {
        "out": torch.zeros(2, 3),
        "anchor": torch.zeros(2, 3),
        "projected": torch.zeros(2, 3),
        "eigenvectors": torch.eye(3),
        "eigenvalues": torch.ones(3),
        "ridge": 1.0,
    }
    return apply_spectral(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"out": torch.zeros(3)}, ShapeMismatchError, r"out must be \(out, in\).*\(3,\)"),
        ({"anchor": torch.zeros(3, 2)}, ShapeMismatchError, r"anchor must be \(2, 3\).*\(3, 2\)"),
        ({"projected": torch.zeros(3, 2)}, ShapeMismatchError, "projected"),
        ({"eigenvectors": torch.zeros(2, 2)}, ShapeMismatchError, r"eigenvectors must be \(3, 3\)"),
        ({"eigenvalues": torch.zeros(2)}, ShapeMismatchError, r"eigenvalues must be \(3,\)"),
        ({"factors": torch.ones(3)}, ConfigError, "ridge, with the eigenvalues, or factors .* not both"),
        ({"ridge": None}, ConfigError, "ridge, with the eigenvalues, or factors .* not both"),
        ({"eigenvalues": None}, ConfigError, "ridge is 1.0, which needs the eigenvalues"),
        ({"ridge": None, "factors": torch.ones(2)}, ShapeMismatchError, r"factors must be \(3,\).*\(2,\)"),
        ({"ridge": None, "factors": torch.ones(3).half()}, ConfigError, "factors.*float16"),
        ({"ridge": None, "factors": torch.ones(3, device="meta")}, ConfigError, "factors is on meta"),
        ({"base": torch.zeros(3, 2), "scale": 0.5}, ShapeMismatchError, "base"),
        ({"scale": 0.5}, ConfigError, "scale is 0.5, which needs base"),
        ({"scale": math.nan, "base": torch.zeros(2, 3)}, ConfigError, "scale must be finite"),
        ({"ridge": -1.0}, ConfigError, "ridge must be >= 0, and is -1.0"),
        ({"ridge": math.nan}, ConfigError, "nan"),
        ({"out": torch.zeros(2, 3, dtype=torch.int32)}, ConfigError, "out.*int32"),
        ({"anchor": torch.zeros(2, 3, dtype=torch.int32)}, ConfigError, "anchor.*int32"),
        ({"projected": torch.zeros(2, 3).half()}, ConfigError, "projected.*float16"),
        ({"projected": torch.zeros(2, 3).double()}, ConfigError, "float64 and torch.float32"),
        ({"anchor": torch.zeros(2, 3, device="meta")}, ConfigError, "meta"),
        ({"precision": "fast"}, ConfigError, "fast"),
    ],
)
def test_errors_name_the_values(changes, error, match):
    with pytest.raises(error, match=match):
        call(**changes)


@each_gpu_backend("cuda", "triton")
def test_work_on_a_side_stream_is_in_its_order(backend):
    problem, stream = Problem((100, 64), device="cuda"), torch.cuda.Stream()
    truth, anchor = problem.definition(0.2), problem.anchor
    problem.anchor = torch.zeros_like(anchor)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        fill_late(problem.anchor, anchor)
        result = problem.apply(0.2, backend)
    stream.synchronize()
    torch.testing.assert_close(result.double(), truth, rtol=1e-4, atol=1e-4)


@needs_two_devices
@each_gpu_backend("cuda", "triton")
def test_on_a_device_that_is_not_the_current(backend):
    problem = Problem((20, 30), device="cuda:1")
    with torch.cuda.device(0):
        result = problem.apply(0.2, backend)
    torch.testing.assert_close(result.double(), problem.definition(0.2), rtol=1e-4, atol=1e-4)

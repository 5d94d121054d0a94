from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bmm_engine
from bmm_engine.errors import BackendError, ConfigError
from bmm_engine.ops import _dispatch, _native, _triton
from bmm_engine.ops.assemble import assemble
from bmm_engine.ops.gram import accumulate_gram

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def fake(reason=None):
    return SimpleNamespace(supports=lambda *call: reason)


def run_python(code, *arguments, **environment):
    environment = {**os.environ, **environment}
    command = [sys.executable, *arguments, code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("BMM_BACKEND", raising=False)


@pytest.fixture
def info(caplog, monkeypatch):
    monkeypatch.setattr(_dispatch, "_announced", set())
    monkeypatch.setattr(_dispatch, "_self_checks", {})
    caplog.set_level(logging.INFO, logger="bmm_engine")
    return caplog


def test_auto_takes_the_first_that_can_and_says_so_once(info):
    table = {"torch": fake(), "cpu": fake()}
    for _ in range(3):
        assert _dispatch.select("op", table, "auto", CPU) is table["cpu"]
    assert [record.getMessage() for record in info.records] == ["op: backend 'cpu' on cpu"]
    assert info.records[0].levelno == logging.INFO


def test_auto_says_what_it_passed_over(info):
    table = {"torch": fake(), "cpu": fake("no compiler")}
    assert _dispatch.select("op", table, "auto", CPU) is table["torch"]
    assert info.messages == ["op: backend 'torch' on cpu (not cpu: no compiler)"]


def test_auto_on_an_unknown_device_is_torch():
    table = {"torch": fake(), "cpu": fake(), "cuda": fake()}
    assert _dispatch.select("op", table, "auto", torch.device("meta")) is table["torch"]


def test_auto_with_nothing_left_raises():
    with pytest.raises(BackendError, match="cpu: a; torch: b"):
        _dispatch.select("op", {"torch": fake("b"), "cpu": fake("a")}, "auto", CPU)


def test_explicit_backend_that_cannot_run_raises_and_does_not_move_on():
    with pytest.raises(BackendError, match="op: backend 'cpu' cannot run this call: no compiler"):
        _dispatch.select("op", {"torch": fake(), "cpu": fake("no compiler")}, "cpu", CPU)


def test_unknown_backend_lists_the_known():
    with pytest.raises(ConfigError, match=r"'gpu'; known: auto, cpu, torch"):
        accumulate_gram(torch.zeros(2, 2), torch.zeros(1, 2), backend="gpu")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("torch", "torch"), ("op=torch", "torch"), ("other=torch", "cpu"), ("other=cpu, op=torch", "torch"), ("", "cpu")],
)
def test_environment_overrides_auto(monkeypatch, value, expected):
    monkeypatch.setenv("BMM_BACKEND", value)
    table = {"torch": fake(), "cpu": fake()}
    assert _dispatch.select("op", table, "auto", CPU) is table[expected]
    assert _dispatch.select("op", table, "cpu", CPU) is table["cpu"], "an argument is stronger"


def test_environment_is_named_when_its_choice_cannot_run(monkeypatch):
    monkeypatch.setenv("BMM_BACKEND", "cpu")
    with pytest.raises(BackendError, match="set by BMM_BACKEND"):
        _dispatch.select("op", {"torch": fake(), "cpu": fake("no")}, "auto", CPU)
    monkeypatch.setenv("BMM_BACKEND", "nonsense")
    with pytest.raises(ConfigError, match=r"nonsense.*set by BMM_BACKEND"):
        _dispatch.select("op", {"torch": fake()}, "auto", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_without_a_device_says_why():
    with pytest.raises(BackendError, match=r"backend 'cuda' cannot run this call: bmm_engine\._cuda"):
        assemble([torch.eye(3)], [1.0], 0.5, backend="cuda")


def test_cpu_backend_refuses_tensors_elsewhere():
    with pytest.raises(BackendError, match="meta"):
        accumulate_gram(torch.zeros(2, 2, device="meta"), torch.zeros(3, 2, device="meta"), backend="cpu")


def test_on_a_gpu_auto_tries_cuda_then_triton_then_torch():
    table = {name: fake(f"no {name}") for name in ("cpu", "cuda", "torch", "triton")}
    with pytest.raises(BackendError, match="cuda: no cuda; triton: no triton; torch: no torch"):
        _dispatch.select("op", table, "auto", GPU)


class Checked:
    """A self-check that finds `verdicts[name]` wrong with that backend (or raises it), and counts its runs."""

    def __init__(self, table, **verdicts):
        self.table, self.verdicts, self.runs = table, verdicts, []

    def __call__(self, implementation, device, *variant):
        (name,) = (name for name, known in self.table.items() if known is implementation)
        self.runs.append((name, device, *variant))
        if isinstance(self.verdicts.get(name), Exception):
            raise self.verdicts[name]
        return self.verdicts.get(name)


def test_a_gpu_backend_is_checked_once_per_device_and_variant(info):
    table = {"torch": fake(), "triton": fake()}
    check = Checked(table)
    for variant in ("float32", "float32", "float16"):
        for device in (GPU, GPU, torch.device("cuda", 1)):
            assert _dispatch.select("op", table, "auto", device, self_check=(check, variant)) is table["triton"]
    devices = GPU, torch.device("cuda", 1)
    assert check.runs == [("triton", device, variant) for variant in ("float32", "float16") for device in devices]
    _dispatch.select("other op", table, "auto", GPU, self_check=(check, "float32"))
    assert len(check.runs) == 5
    assert all(record.levelno == logging.INFO for record in info.records)


@pytest.mark.parametrize(
    ("verdict", "said"), [("it is 2.0 off", "it is 2.0 off"), (ValueError("no such PTX"), "ValueError: no such PTX")]
)
def test_a_gpu_backend_that_fails_its_check_is_passed_over_with_a_warning(info, verdict, said):
    table = {"torch": fake(), "cuda": fake(), "triton": fake()}
    check = Checked(table, cuda=verdict)
    for _ in range(3):
        assert _dispatch.select("op", table, "auto", GPU, self_check=(check,)) is table["triton"]
    assert [run[0] for run in check.runs] == ["cuda", "triton"]
    warnings = [record.getMessage() for record in info.records if record.levelno == logging.WARNING]
    assert warnings == [f"op: backend 'cuda' is passed over on cuda:0: its self-check failed: {said}"]
    assert f"op: backend 'triton' on cuda (not cuda: its self-check failed: {said})" in info.messages


def test_an_explicit_backend_that_fails_its_check_raises(info):
    table = {"torch": fake(), "triton": fake()}
    check = Checked(table, triton="it is 2.0 off")
    with pytest.raises(BackendError, match=r"'triton' cannot run this call: its self-check failed: it is 2\.0 off"):
        _dispatch.select("op", table, "triton", GPU, self_check=(check,))


def test_torch_and_cpu_tensors_are_not_checked(info):
    table = {"torch": fake(), "cpu": fake(), "cuda": fake("no driver")}
    check = Checked(table, torch="wrong", cpu="wrong", cuda="wrong")
    for backend, device in (("auto", CPU), ("cpu", CPU), ("auto", GPU), ("torch", GPU)):
        _dispatch.select("op", table, backend, device, self_check=(check,))
    assert not check.runs


PROBLEMS = {
    "gram": [(torch.float32, "plain", "ieee"), (torch.bfloat16, "mask", "ieee"), (torch.float32, "numbers", "tf32")],
    "cross_gram": [(torch.float32, "plain", "ieee"), (torch.float16, "numbers", "ieee")],
    "assemble": [((torch.float32, torch.float64), torch.float32), ((torch.float64,), torch.float64)],
    "residual": [((torch.bfloat16, torch.float32), torch.float32, torch.float32, "ieee")],
    "spectral": [(torch.bfloat16, torch.bfloat16, torch.float32, "ieee"), (*[torch.float64] * 3, "ieee")],
}


@pytest.mark.parametrize(("op", "variant"), [(op, variant) for op, found in PROBLEMS.items() for variant in found])
def test_every_self_check_passes_what_is_right_and_finds_what_is_not(op, variant):
    package = importlib.import_module(f"bmm_engine.ops.{op}")
    reference = package.IMPLEMENTATIONS["torch"]
    (name,) = (name for name in vars(reference) if name.startswith(("accumulate", "assemble", "residual", "apply")))
    computed = {"gram": 0, "cross_gram": 0, "assemble": -1, "residual": -2, "spectral": 0}[op]
    assert package._self_check(reference, CPU, *variant) is None

    def wrong(*call):
        getattr(reference, name)(*call)
        call[computed][..., -1, -7:] = 0

    assert "differs from torch" in package._self_check(SimpleNamespace(**{name: wrong}), CPU, *variant)

    def nothing(*call):
        call[computed].fill_(float("nan"))

    assert "differs from torch" in package._self_check(SimpleNamespace(**{name: nothing}), CPU, *variant)


WITHOUT_COMPILED_MODULES = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO)
sys.modules["bmm_engine._cpu"] = sys.modules["bmm_engine._cuda"] = None
from bmm_engine.errors import BackendError
from bmm_engine.ops.assemble import assemble
from bmm_engine.ops.gram import accumulate_gram
X = torch.randn(5, 3)
torch.testing.assert_close(accumulate_gram(torch.zeros(3, 3), X), X.T @ X)
torch.testing.assert_close(assemble([torch.eye(3)], [2.0], 1.0), 3 * torch.eye(3))
for call in (lambda: accumulate_gram(torch.zeros(3, 3), X, backend="cpu"),
             lambda: assemble([torch.eye(3)], [1.0], 0.0, backend="cpu")):
    try:
        call()
    except BackendError as error:
        print(error)
import bmm_engine.__main__
bmm_engine.__main__.main()
"""


def test_without_compiled_modules_torch_does_the_work():
    done = run_python(WITHOUT_COMPILED_MODULES, "-c")
    assert done.returncode == 0, done.stderr
    assert "gram: backend 'cpu' cannot run this call: bmm_engine._cpu is not built" in done.stdout
    assert "assemble: backend 'cpu' cannot run this call: bmm_engine._cpu is not built" in done.stdout
    assert "gram: backend 'torch' on cpu (not cpu: bmm_engine._cpu is not built" in done.stderr
    assert "backend cpu    bmm_engine._cpu is not built" in done.stdout


BROKEN_MODULE = """
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "bmm_engine._cpu":
            raise ImportError("libfoo.so.1: cannot open shared object file")
sys.meta_path.insert(0, Broken())
from bmm_engine.ops import _native
print(_native.cpu_missing())
"""


def test_a_compiled_module_that_does_not_load_is_recorded():
    done = run_python(BROKEN_MODULE, "-c")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip() == "bmm_engine._cpu is built but does not load: libfoo.so.1: cannot open shared object file"
    )


def test_the_installed_package_has_its_kernels():
    assert _native.cpu_missing() is None, "run the tests on an installed package: make test"


def test_native_errors_carry_file_line_and_values():
    native, one = _native.cpu(), _native.matrix(torch.zeros(1, 1))
    with pytest.raises(native.Error, match=r"^cpu/\w+.cpp:\d+: expected threads >= 1: threads is 0"):
        native.gram(one, 0, one, 0, "")
    with pytest.raises(native.Error, match="instruction set 'mmx'"):
        native.gram(one, 0, one, 1, "mmx")
    with pytest.raises(native.Error, match="dtype code is 9"):
        native.gram((*one[:-1], 9), 0, one, 1, "")


def test_diagnostics():
    done = run_python("bmm_engine", "-m")
    assert done.returncode == 0, done.stderr
    for name in ("bmm_engine", "python", "torch", "triton", "cupy", "transformers", "safetensors"):
        assert name in done.stdout
    assert bmm_engine.__version__ in done.stdout
    for backend in ("torch", "cpu", "cuda", "triton"):
        assert f"backend {backend}" in done.stdout
    assert "instruction set" in done.stdout


def test_import_brings_no_heavy_dependency():
    code = """
import sys, bmm_engine, bmm_engine.ops.gram, bmm_engine.ops.spectral
print([m for m in ('transformers', 'pydantic', 'triton', 'typer') if m in sys.modules])
"""
    done = run_python(code, "-c")
    assert done.stdout.strip() == "[]", done.stderr


WITHOUT_TRITON = """
import sys, torch
sys.modules["triton"] = None
from bmm_engine.errors import BackendError
from bmm_engine.ops.gram import accumulate_gram
X = torch.randn(5, 3)
torch.testing.assert_close(accumulate_gram(torch.zeros(3, 3), X), X.T @ X)
try:
    accumulate_gram(torch.zeros(3, 3), X, backend="triton")
except BackendError as error:
    print(error)
"""


def test_without_triton_everything_else_works():
    done = run_python(WITHOUT_TRITON, "-c")
    assert done.returncode == 0, done.stderr
    assert "gram: backend 'triton' cannot run this call: triton is not installed" in done.stdout


@pytest.mark.skipif(not _triton.interpreted(), reason="kernels are compiled here, or triton is absent")
def test_triton_without_a_device_says_what_would_help():
    done = run_python("bmm_engine", "-m", TRITON_INTERPRET="0")
    assert "backend triton torch sees no CUDA device; set TRITON_INTERPRET=1" in done.stdout, done.stderr


@pytest.mark.skipif(not _triton.interpreted(), reason="kernels are compiled here")
def test_triton_refuses_tensors_elsewhere():
    with pytest.raises(BackendError, match="TRITON_INTERPRET is set, which is for CPU tensors, not for meta"):
        accumulate_gram(torch.zeros(2, 2, device="meta"), torch.zeros(3, 2, device="meta"), backend="triton")


@pytest.mark.gpu
def test_triton_on_a_device_refuses_cpu_tensors():
    with pytest.raises(BackendError, match="on cpu, not on a CUDA device"):
        accumulate_gram(torch.zeros(2, 2), torch.zeros(3, 2), backend="triton")


@pytest.mark.gpu
def test_the_backends_here_pass_their_self_checks(info):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        X = torch.randn(30, 20, device="cuda").to(dtype)
        for weights in (None, torch.rand(30, device="cuda") > 0.5, torch.rand(30, device="cuda")):
            accumulate_gram(torch.zeros(20, 20, device="cuda"), X, weights)
    assemble([torch.eye(3, device="cuda")], [1.0], 0.5)
    assert [record for record in info.records if record.levelno >= logging.WARNING] == []


def test_tables_keep_integers_and_the_bits_of_floats():
    pytest.importorskip("triton")
    table = _triton.table([2**62, -3, 0.1, 1], CPU)
    assert table.tolist()[:2] == [2**62, -3]
    assert table[2:3].view(torch.float64).item() == 0.1
    assert _triton.table([2**62, -3, 0.1, 1], CPU) is table
    assert _triton.table([2**62, -3, 0.1, 1.0], CPU) is not table

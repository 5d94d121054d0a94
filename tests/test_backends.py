from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bmm_engine
from bmm_engine.errors import BackendError, ConfigError
from bmm_engine.ops import _dispatch, _native
from bmm_engine.ops.assemble import assemble
from bmm_engine.ops.gram import accumulate_gram

CPU = torch.device("cpu")


def fake(reason=None):
    return SimpleNamespace(supports=lambda *call: reason)


def run_python(code, *arguments):
    return subprocess.run([sys.executable, *arguments, code], capture_output=True, text=True, timeout=120)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("BMM_BACKEND", raising=False)


@pytest.fixture
def info(caplog, monkeypatch):
    monkeypatch.setattr(_dispatch, "_announced", set())
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
    native, G = _native.cpu(), torch.zeros(1, 1)
    with pytest.raises(native.Error, match=r"^cpu/gram.cpp:\d+: expected threads >= 1: threads is 0"):
        native.gram(G.data_ptr(), 1, 1, 1, 1, 0, 0, G.data_ptr(), 1, 0, 0, "")
    with pytest.raises(native.Error, match="instruction set 'mmx'"):
        native.gram(G.data_ptr(), 1, 1, 1, 1, 0, 0, G.data_ptr(), 1, 0, 1, "mmx")
    with pytest.raises(native.Error, match="dtype code is 9"):
        native.gram(G.data_ptr(), 1, 1, 1, 1, 9, 0, G.data_ptr(), 1, 0, 1, "")


def test_diagnostics():
    done = run_python("bmm_engine", "-m")
    assert done.returncode == 0, done.stderr
    for name in ("bmm_engine", "python", "torch", "triton", "cupy", "transformers", "safetensors"):
        assert name in done.stdout
    assert bmm_engine.__version__ in done.stdout
    for backend in ("torch", "cpu", "cuda"):
        assert f"backend {backend}" in done.stdout
    assert "instruction set" in done.stdout


def test_import_brings_no_heavy_dependency():
    code = "import sys, bmm_engine; print([m for m in ('transformers', 'pydantic', 'typer') if m in sys.modules])"
    done = run_python(code, "-c")
    assert done.stdout.strip() == "[]", done.stderr

"""The gate comes before the clock, every backend meets every rival, and a row says all that it must."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import harness, report, timing
from bmm_engine.errors import BackendError
from bmm_engine.ops import _native
from tests.bench.cases import BF16, F32, F64, SMALL

CPU = torch.device("cpu")
KEYS = {
    *("op", "backend", "device", "hardware", "dtype", "shape", "rival"),
    *("ours_ms", "ours_spread", "rival_ms", "rival_spread", "ratio", "tflops", "peak_share", "gbytes_per_s"),
    *("peak_mib", "error", "rival_error", "commit", "versions", "rival_mib", "private_mib", "rival_private_mib"),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SMALL)
def test_rows_are_complete(name, tmp_path):
    case = SMALL[name](CPU)
    rows = harness.measure(case, rounds=2)
    assert {row.rival for row in rows} == set(case.rivals)
    for row in rows:
        assert row.ours_ms > 0
        assert row.ratio == pytest.approx(row.rival_ms / row.ours_ms)
        assert row.peak_share > 0
        assert row.error < (1e-4 if name == "regmean float32" else 1e-6)
        assert row.rival_error < 0.1  # the rival does the same work, if in less exact arithmetic
        assert (row.tflops is None) == (row.op in ("select", "ranks"))
        assert row.op == name.split()[0].rstrip(",")
    report.write_json(rows, tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [set(row) for row in written] == [KEYS] * len(rows)
    assert report.read_json(tmp_path / "rows.json") == rows


def spoilt(result: Any) -> Any:
    """A result that is off by a thousandth."""
    if isinstance(result, (list, tuple)):
        return type(result)(spoilt(each) for each in result)
    return result * 1.001


@pytest.mark.usefixtures("known_peaks")
@pytest.mark.parametrize("name", SMALL)
def test_a_wrong_result_stops_before_timing(name, monkeypatch):
    case = SMALL[name](CPU)
    monkeypatch.setattr(timing, "sample", lambda *_, **__: pytest.fail("timed a wrong result"))
    with pytest.raises(AssertionError, match="error"):
        harness.measure(replace(case, ours=lambda backend: spoilt(case.ours(backend))))


@pytest.mark.usefixtures("known_peaks")
@pytest.mark.parametrize(
    "name", sorted(SMALL.keys() - {"select", "ranks", "cholesky", "regmean float64", "regmean float32"})
)
def test_an_op_that_does_nothing_stops_before_timing(name, monkeypatch):
    """What writes in place has no right result left over from before."""
    case = SMALL[name](CPU)
    left_over = case.ours("torch")
    monkeypatch.setattr(timing, "sample", lambda *_, **__: pytest.fail("timed a wrong result"))
    with pytest.raises(AssertionError, match="error"):
        harness.measure(replace(case, ours=lambda backend: left_over))


@pytest.mark.usefixtures("quick")
def test_every_backend_meets_every_rival_in_one_run(monkeypatch, capsys):
    """Backends that cannot run are named and left out; plain torch stands in only where none is left."""
    case = SMALL["gram"](CPU)
    assert len(case.rivals) == 2
    runs = []
    measured = timing.interleaved

    def counting(works, *arguments, **options):
        runs.append(len(works))
        return measured(works, *arguments, **options)

    def ours(backend):
        if backend == "absent":
            raise BackendError("absent: not on this machine")
        return case.ours("torch")

    monkeypatch.setattr(timing, "interleaved", counting)
    rows = harness.measure(replace(case, backends=["one", "absent", "other"], ours=ours), rounds=2)
    assert [(row.backend, row.rival) for row in rows] == [
        (backend, rival) for backend in ("one", "other") for rival in case.rivals
    ]
    assert runs == [4]
    assert "absent: not on this machine" in capsys.readouterr().err

    rows = harness.measure(replace(case, backends=["absent"], ours=ours), rounds=2)
    assert {row.backend for row in rows} == {"torch"}


@pytest.mark.parametrize(("dtype", "kind"), [(F32, "fp32"), (F64, "fp64"), (BF16, "bf16"), (torch.float16, "bf16")])
def test_arithmetic_that_bounds(dtype, kind):
    assert harness.arithmetic(dtype) == kind


@pytest.mark.skipif(_native.cpu_missing() is not None, reason=str(_native.cpu_missing()))
def test_memory_that_a_call_takes_is_seen():
    kept = []
    taken = harness.peak_mib_of(lambda: kept.append(torch.ones(16 << 20)), CPU)
    assert taken == pytest.approx(64, abs=8)


@pytest.mark.gpu
@pytest.mark.usefixtures("known_peaks")
@pytest.mark.parametrize("name", SMALL)
def test_on_a_gpu(name):
    device = torch.device("cuda")
    for row in harness.measure(SMALL[name](device), rounds=2):
        assert row.device == "cuda"
        assert row.ours_ms > 0
        assert row.peak_mib is not None

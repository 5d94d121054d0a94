from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bench import assemble, gram, harness
from bmm_engine.ops import _native

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(_native.cpu_missing() is not None, reason=str(_native.cpu_missing()))


@pytest.fixture
def small_peak(monkeypatch):
    monkeypatch.setattr(harness.peak, "measured", lambda device: harness.peak.Peak(1.0, 10.0))


def small_cases():
    yield gram.case(CPU, "cpu", "tiny", 64, 48, torch.bfloat16)
    yield assemble.case(CPU, "cpu", 40, 3, torch.float32, torch.float64)


@pytest.mark.usefixtures("small_peak")
def test_rows_are_complete(tmp_path):
    rows = [harness.measure(case, rounds=2) for case in small_cases()]
    for row in rows:
        assert row.ours_ms > 0
        assert row.ratio == pytest.approx(row.rival_ms / row.ours_ms)
        assert row.error < 1e-5
        assert row.peak_share is not None
        assert row.peak_share > 0
    harness.write_json(rows, tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [set(row) for row in written] == [
        {field.name for field in dataclasses.fields(harness.Row)} | {"versions"}
    ] * 2
    assert "torch.addmm" in harness.table(rows)


@pytest.mark.usefixtures("small_peak")
@pytest.mark.parametrize("case", list(small_cases()), ids=lambda case: case.op)
def test_a_wrong_result_stops_before_timing(case, monkeypatch):
    monkeypatch.setattr(harness, "_milliseconds", lambda *_: pytest.fail("timed a wrong result"))
    wrong = dataclasses.replace(case, ours=lambda: case.ours() * 1.001)
    with pytest.raises(AssertionError, match="relative error"):
        harness.measure(wrong)


def test_the_probe_measures():
    native = _native.cpu()
    assert native.probe_fma_gflops(1) > 0.1
    with pytest.raises(native.Error, match="threads is 0"):
        native.probe_fma_gflops(0)


def test_memory_of_a_merge_is_measured_and_within_its_bound(tmp_path):
    from bench import memory

    shapes = memory.llama_shapes(layers=1, hidden=64, intermediate=160, vocabulary=300, key_value=32)
    report = memory.run(tmp_path, experts=2, heads=4, shard="100KB", shapes=shapes)
    assert report["modules"] == 7
    assert 50 < report["peak_mib"] < report["bound_mib"]
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists() or (
        tmp_path / "merged" / "model.safetensors"
    ).exists()

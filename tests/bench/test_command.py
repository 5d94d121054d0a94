"""`python -m bench`: what is selected is measured, what is wrong is told by the exit status."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import assemble, peak, scaling
from bench.__main__ import OPS, main
from bmm_engine.ops import _native
from tests.bench.cases import SMALL

NATIVE = pytest.mark.skipif(_native.cpu_missing() is not None, reason=str(_native.cpu_missing()))


@pytest.fixture
def small_cases(monkeypatch):
    """`assemble` with two small shapes, "right" and "wrong"."""
    right = SMALL["assemble"](torch.device("cpu"))
    wrong = replace(right, ours=lambda backend: right.ours(backend) + 1)
    plans = [("the right one", lambda: right), ("the wrong one", lambda: wrong)]
    monkeypatch.setattr(assemble, "cases", lambda device: iter(plans))


@pytest.mark.usefixtures("quick", "small_cases")
def test_a_selected_case_is_measured_and_written(tmp_path, capsys):
    file = tmp_path / "new" / "rows.json"
    assert main(["assemble", "--shapes", "right", "--rounds", "2", "--json", str(file), "--markdown"]) == 0
    assert [row["op"] for row in json.loads(file.read_text())] == ["assemble"]
    assert "| assemble |" in capsys.readouterr().out


@pytest.mark.usefixtures("quick", "small_cases")
def test_a_wrong_case_fails_the_command_and_not_the_other_cases(tmp_path, capsys):
    assert main(["assemble", "--rounds", "2", "--json", str(tmp_path / "rows.json")]) == 1
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 1
    assert "WRONG: assemble the wrong one: relative error" in capsys.readouterr().err


@pytest.mark.usefixtures("quick", "small_cases")
def test_nothing_selected_is_an_error(capsys):
    assert main(["assemble", "--shapes", "no such"]) == 1
    assert "no shape holds 'no such'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grma"], "invalid choice: 'grma'"),
        (["gram", "--rounds", "1"], "at least 2"),
        (["gram", "--plot", "curves.png"], "for the bench `scaling`"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_scaling_prints_a_verdict_for_each_axis(monkeypatch, capsys):
    small = partial(SMALL["assemble"], torch.device("cpu"))
    axes = [
        scaling.Axis("assemble", quantity, 1, [1, 2, 3], lambda shape, size: replace(small(), shape=shape), "width 40")
        for quantity in ("T", "width")
    ]
    monkeypatch.setattr(scaling, "axes", lambda device: axes)
    assert main(["scaling", "--rounds", "2", "--shapes", "assemble T"]) == 0
    out = capsys.readouterr().out
    assert "assemble against T (width 40; " in out
    assert "assemble against width" not in out
    assert out.count("scaling, T ") >= 3


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_bench_lists_its_shapes_without_making_them(name, kind):
    import importlib

    plans = list(importlib.import_module(f"bench.{name}").cases(torch.device(kind)))
    assert plans
    assert all(isinstance(shape, str) and callable(build) for shape, build in plans)


@NATIVE
def test_the_peaks_are_measured(capsys):
    rates = {row.shape: row for row in peak.rows(torch.device("cpu"))}
    assert rates["fp32 fma"].tflops > 1e-4
    assert 0 < rates["fp64 fma"].tflops < rates["fp32 fma"].tflops
    assert rates["copy, read + written"].gbytes_per_s > 0.1
    assert all(row.rival == "-" and row.rival_ms is None for row in rates.values())
    native = _native.cpu()
    with pytest.raises(native.Error, match="threads is 0"):
        native.probe_f32_gflops(0)


@pytest.mark.usefixtures("known_peaks")
def test_shares_are_of_the_right_peak():
    cpu = torch.device("cpu")
    assert peak.share(cpu, "fp32", 0.5, 1.0) == 0.5
    assert peak.share(cpu, "fp64", 0.25, 1.0) == 0.5
    assert peak.share(cpu, "copy", 0.5, 1.0) == 0.1
    assert peak.share(cpu, "bf16", 0.5, 1.0) == 0.5  # this machine has none: fp32 is what bounds it

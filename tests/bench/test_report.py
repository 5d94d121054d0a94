from __future__ import annotations

import dataclasses
import json

import pytest

from bench import report
from bench.__main__ import main

ROW = report.Row(
    op="gram",
    backend="cpu",
    device="cpu",
    hardware="a machine, 2 threads",
    dtype="float32",
    shape="8 x 4",
    rival="torch.addmm_",
    ours_ms=1234.5,
    ours_spread=0.03,
    rival_ms=2.5,
    rival_spread=0.1,
    ratio=0.00203,
    tflops=0.5,
    peak_share=0.25,
    gbytes_per_s=12.0,
    peak_mib=0.0,
    error=1.2e-7,
    rival_error=2.5e-3,
    commit="abc1234",
    versions={"python": "3.11", "torch": "2.4"},
)
PEAK = dataclasses.replace(
    ROW, op="peak", rival="-", ours_ms=None, ours_spread=None, rival_ms=None, rival_spread=None, ratio=None, error=None
)


def test_the_table_renders():
    plain = report.table([ROW, PEAK]).splitlines()
    assert plain[0] == "a machine, 2 threads, commit abc1234, python 3.11, torch 2.4"
    assert plain[2].split()[:4] == ["op", "backend", "shape", "dtype"]
    for cell in ("1234 ±3%", "2.5 ±10%", "25%", "1.2e-07", "0.0025"):
        assert cell in plain[3]
    markdown = report.table([ROW, PEAK], markdown=True).splitlines()[2:]
    assert len({line.count("|") for line in markdown}) == 1
    assert set(markdown[1]) == set("| -")
    assert "hardware" not in markdown[0]


def test_rows_of_two_machines_name_them():
    other = dataclasses.replace(ROW, hardware="another")
    text = report.table([ROW, other], markdown=True)
    assert text.splitlines()[0].startswith("a machine")
    assert text.splitlines()[-1].endswith("| another |")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1234"), (0.0123, "0.0123"), (12.34, "12.3"), (2e-7, "2.0e-07"), (5e7, "5.0e+07")],
)
def test_numbers(value, text):
    assert report.number(value) == text


def test_the_table_command_prints_committed_rows_and_names_what_holds_none(tmp_path, capsys):
    report.write_json([ROW], tmp_path / "new.json")
    old = {key: value for key, value in dataclasses.asdict(PEAK).items() if key != "rival_error"}
    (tmp_path / "old.json").write_text(json.dumps([old]))
    (tmp_path / "memory.json").write_text('{"peak_mib": 3}')
    assert main(["table", *map(str, sorted(tmp_path.glob("*.json")))]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n|") == 4
    assert "memory.json holds no benchmark rows" in err
    assert main(["table", str(tmp_path / "memory.json")]) == 1

"""A short part of the campaign, and that its judges bite."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.fuzz.campaign import judge
from tests.fuzz.case import (
    HANG,
    LONG,
    MEMORY,
    OK,
    ORACLE,
    RAW,
    REFUSED,
    SILENT,
    TYPED,
    UNJUDGED,
    UNNAMED,
    Case,
    Ended,
    Invalid,
    Unjudged,
)
from tests.fuzz.oracles import check_average
from tests.fuzz.reading import parse_json, tensors_in
from tests.fuzz.tensors import joined
from tests.fuzz.yaml_core import parse_yaml

ROOT = Path(__file__).parents[2]


def test_a_short_campaign_finds_no_fault() -> None:
    # In a process of its own: the cases are forked off, which a process with threads should not be.
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "21", "--seed", "19"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def ended(code: int | None = 0, err: str = "", **other: object) -> Ended:
    return Ended(**{"code": code, "signal": None, "out": "", "err": err, "peak_bytes": 0, "seconds": 0.1, **other})


def unclear(_: Ended) -> str:
    raise Unjudged("who knows")


@pytest.mark.parametrize(
    ("how", "judged", "harmless", "what"),
    [
        (ended(), lambda _: None, False, OK),
        (ended(), lambda _: "w is off", False, SILENT),
        (ended(), unclear, False, UNJUDGED),
        (ended(), lambda _: {}["no"], False, ORACLE),
        (ended(2, "warning: x\nerror: a.json: is wrong"), None, False, TYPED),
        (ended(2, "error: is wrong"), None, False, UNNAMED),
        (ended(2, "error: a.json: " + "long " * 400), None, False, LONG),
        (ended(2, "error: a.json: is wrong"), None, True, REFUSED),
        (ended(2, "Usage: bmm"), None, False, RAW),
        (ended(1, "Traceback (most recent call last):\nValueError: x"), None, False, RAW),
        (ended(2, "Traceback (most recent call last):\nerror: a.json"), None, False, RAW),
        (ended(1, "Traceback (most recent call last):\nMemoryError"), None, False, MEMORY),
        (ended(0, peak_bytes=3 * 2**30), lambda _: None, False, MEMORY),
        (ended(None, signal=signal.SIGALRM), None, False, HANG),
        (ended(None, signal=signal.SIGBUS), None, False, RAW),
    ],
)
def test_what_a_case_comes_to(how, judged, harmless, what):
    assert judge(Case("", [], ("a.json",), judged, harmless), how)[0] == what


def test_the_average_is_exact(tmp_path):
    for name, value in (("base", 0.0), ("one", 1.0), ("two", 2.0), ("right", 1.5), ("wrong", 1.50001)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((3,), value)}, tmp_path / name / "model.safetensors")
    base, experts = tmp_path / "base", [tmp_path / "one", tmp_path / "two"]
    assert check_average(tmp_path / "right", base, experts) is None
    assert "w is off" in str(check_average(tmp_path / "wrong", base, experts))
    save_file({"w": torch.tensor([1.0, math.nan, 1.0])}, tmp_path / "one" / "model.safetensors")
    assert "NaN" in str(check_average(tmp_path / "right", base, experts))


def test_strict_readers(tmp_path):
    for text in ('{"a": 1, "a": 2}', "NaN", "1e999", b"\xff", "[" * 200 + "]" * 200, "{"):
        with pytest.raises(Invalid):
            parse_json(text)
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    (tmp_path / "twice.safetensors").write_bytes(joined(f'{{"a":{entry},"a":{entry}}}', bytes(4)))
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("twice", "pipe", "none"):
        with pytest.raises(Invalid):
            tensors_in(tmp_path / f"{name}.safetensors")


def test_the_core_schema():
    said = parse_yaml(
        b"\xef\xbb\xbfa: 1:30\nb: 010\nc: yes\nd: 1e3\ne: 0o17\nf: ~\ng: 2026-01-01\nh: '1'\ni: -.inf\nj: 1_000\n"
    )
    assert said == {
        "a": "1:30",
        "b": 10,
        "c": "yes",
        "d": 1000.0,
        "e": 15,
        "f": None,
        "g": "2026-01-01",
        "h": "1",
        "i": -math.inf,
        "j": "1_000",
    }
    bomb = "a: &a [1]\n" + f"b: [{', '.join(['*a'] * 101)}]\n"
    for text in ("a: 1\na: 2", "a: {b: 1, b: 1}", bomb, "[" * 100 + "]" * 100, "a: [", "? [1]\n: 2"):
        with pytest.raises(Invalid):
            parse_yaml(text.encode())

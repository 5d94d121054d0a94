from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from bmm_engine.errors import CheckpointError, ConfigError, EmptyCalibrationError
from bmm_engine.statistics.calibration import read_calibration

TEXTS = [f"sentence number {i}" for i in range(10)]


def write(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(TEXTS) + "\n\n")
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t, "label": 1}) + "\n" for t in TEXTS))
    elif suffix == ".tsv":
        path.write_text("label\ttext\n" + "".join(f"1\t{t}\n" for t in TEXTS))
    elif suffix == ".csv":
        path.write_text("label,text\r\n" + "".join(f'1,"{t}"\r\n' for t in TEXTS), newline="")
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".tsv", ".csv"])
def test_texts(tmp_path, suffix):
    path = write(tmp_path, suffix)
    assert list(read_calibration(path).texts) == TEXTS
    assert list(read_calibration(path, samples=5).texts) == TEXTS[::2]
    assert "10 samples, sha256" in read_calibration(path).describe()
    if suffix != ".txt":
        with pytest.raises(ConfigError, match=r"no column 'body'.*text"):
            read_calibration(path, field="body")


def test_inputs(tmp_path):
    pixels = torch.randn(10, 3, 4, 4)
    save_file({"pixel_values": pixels}, tmp_path / "p.safetensors")
    data = read_calibration(tmp_path / "p.safetensors", samples=5)
    batches = list(data.batches(tmp_path, batch_size=2, max_length=1))
    assert [len(b["pixel_values"]) for b in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([b["pixel_values"] for b in batches]), pixels[::2])
    save_file({"a": torch.ones(3, 1), "b": torch.ones(4, 1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError, match="'a': 3, 'b': 4"):
        read_calibration(tmp_path / "odd.safetensors")


def test_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_calibration(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(EmptyCalibrationError, match=r"empty\.txt holds no samples"):
        read_calibration(tmp_path / "empty.txt")
    (tmp_path / "x.parquet").write_text("")
    with pytest.raises(ConfigError, match=r"x\.parquet is of a kind"):
        read_calibration(tmp_path / "x.parquet")
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    with pytest.raises(ConfigError, match=r"bad\.jsonl, line 1: cannot be read"):
        read_calibration(tmp_path / "bad.jsonl")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        read_calibration(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        list(read_calibration(write(tmp_path, ".txt")).batches(tmp_path, batch_size=4, max_length=8))

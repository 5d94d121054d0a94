"""The record of a merge and its model card."""

from __future__ import annotations

import hashlib
import json
import threading
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bmm_engine.checkpoint import (
    Checkpoint,
    InputRecords,
    StateDictSource,
    input_record,
    is_merge_directory,
    merge_record,
    model_card,
)
from bmm_engine.errors import ConfigError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return Checkpoint.open(tmp_path)


def test_hashes(checkpoint: Checkpoint) -> None:
    record = input_record("expert 'math'", checkpoint)
    files = {name: (checkpoint.path / name).read_bytes() for name in ("model.safetensors", "config.json")}
    assert record == {
        "role": "expert 'math'",
        "source": str(checkpoint.path),
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in files.items()
        },
    }


def test_source_in_memory_has_no_files() -> None:
    record = input_record("base", StateDictSource({"w": torch.ones(1)}, label="mine"))
    assert record == {"role": "base", "source": "mine", "files": {}}


def test_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    recipe = {
        "path": Path("a/b"),
        "dtype": torch.bfloat16,
        "alpha": float("inf"),
        "scale": (1, 0.5),
        "deep": {"x": None},
    }
    record = merge_record(recipe, [], modules=[{"name": "q", "ridge": float("nan")}])
    assert record == merge_record(recipe, [], modules=[{"name": "q", "ridge": float("nan")}])
    assert record["format"] == "bmm-merge"
    assert record["format_version"] == 1
    assert record["created"] == "1970-01-02T00:00:00+00:00"
    assert record["versions"]["torch"] == torch.__version__
    assert record["recipe"] == {
        "path": "a/b",
        "dtype": "torch.bfloat16",
        "alpha": "inf",
        "scale": [1, 0.5],
        "deep": {"x": None},
    }
    assert record["modules"] == [{"name": "q", "ridge": "nan"}]
    (tmp_path / "bmm_merge.json").write_text(json.dumps(record, allow_nan=False))
    assert is_merge_directory(tmp_path)
    assert not is_merge_directory(tmp_path / "bmm_merge.json")


def test_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    created = datetime.fromisoformat(merge_record({}, [])["created"])
    assert created.utcoffset() == timedelta(0)
    assert abs(datetime.now(created.tzinfo) - created) < timedelta(minutes=1)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ConfigError, match=r"SOURCE_DATE_EPOCH='yesterday'.*unset it"):
        merge_record({}, [])


def test_what_is_no_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.experts\[1\]\.weights: a Tensor cannot be recorded"):
        merge_record({"experts": [1, {"weights": torch.ones(1)}]}, [])


def test_model_card() -> None:
    inputs = [
        {"role": "base", "source": "org/base", "revision": "abc", "files": {}},
        {"role": "expert 1", "source": "org/math: a 'test'", "revision": "def", "files": {}},
        {"role": "expert 2", "source": "local/dir", "files": {}},
    ]
    recipe = {"anchor": "ties", "text": "two\nlines: {x}"}
    card = model_card(merge_record(recipe, inputs), name="merged", architecture="LlamaForCausalLM")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": ["org/base", "org/math: a 'test'"],
        "library_name": "transformers",
        "tags": ["merge", "bmm-engine"],
    }
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == recipe
    assert "model = LlamaForCausalLM.from_pretrained(" in body
    assert "* base: `org/base` at `abc`" in body
    assert "* expert 2: `local/dir`\n" in body
    assert "base_model" not in model_card(merge_record({}, inputs[2:]), name="m")


def test_inputs_are_hashed_once_each_beside_the_merge(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    hashed = Checkpoint.sha256
    monkeypatch.setattr(Checkpoint, "sha256", lambda self, stop=None: calls.append(self) or hashed(self, stop))
    memory = StateDictSource({"w": torch.ones(1)}, label="mine")
    with InputRecords([("base", checkpoint), ("expert 1", memory), ("expert 2", checkpoint)], threads=2) as inputs:
        records = inputs.result()
    assert records == [
        input_record("base", checkpoint),
        input_record("expert 1", memory),
        input_record("expert 2", checkpoint),
    ]
    assert len(calls) == 1 + 2  # the last two by this test


def test_a_merge_that_fails_does_not_wait_for_hashes(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), []

    def endless(self: Checkpoint, stop: threading.Event) -> None:
        begun.set()
        ended.append(stop.wait(30))

    monkeypatch.setattr(Checkpoint, "sha256", endless)
    with InputRecords([("base", checkpoint)], threads=1):
        assert begun.wait(30)  # and is left without its result, as by an exception
    assert ended == [True]


def test_hashing_stops_when_asked(checkpoint: Checkpoint) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedError):
        checkpoint.sha256(stop)

"""The guard of every reader: only regular files are opened, and JSON says what it says once."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bmm_engine import merge
from bmm_engine.checkpoint import Checkpoint, is_adapter, open_adapter
from bmm_engine.checkpoint.guard import DEEPEST_JSON, parse_json, read_bytes, read_json_object
from bmm_engine.checkpoint.provenance import read_merge_record
from bmm_engine.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    """A reader that opens a pipe waits for ever."""
    signal.alarm(10)
    yield
    signal.alarm(0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    save_file({"w": torch.ones(4, 3)}, path / "one.safetensors")
    (path / INDEX).write_text('{"weight_map": {"w": "one.safetensors"}}')
    (path / "config.json").write_text("{}")
    return path


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (lambda path: os.mkfifo(path), "is not a regular file but a named pipe; put the file itself there"),
    "folder": (lambda path: path.mkdir(), "is not a regular file but a folder"),
    "loop": (loop, "(cannot be read|outside)"),
    "dangling": (dangling, "(cannot be read|not in)"),
    "device": (device, "is a link to /dev/zero, outside"),
}


@pytest.mark.parametrize("name", [INDEX, "one.safetensors", "config.json"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_regular_file(model: Path, name: str, place: str) -> None:
    make, message = PLACES[place]
    (model / name).unlink()
    make(model / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(model)
    assert name in str(caught.value)


@pytest.mark.parametrize("place", ["pipe", "loop", "folder"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_of_pipes(model: Path, tmp_path: Path, name: str, place: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    save_file({"w.lora_A.weight": torch.ones(1, 3)}, adapter / "adapter_model.safetensors")
    (adapter / name).unlink()
    PLACES[place][0](adapter / name)
    assert is_adapter(adapter)
    with pytest.raises(CheckpointError, match=name):
        open_adapter(adapter, Checkpoint.open(model))


def test_a_device_is_not_read() -> None:
    with pytest.raises(CheckpointError, match="/dev/zero: is not a regular file but a device"):
        read_bytes(Path("/dev/zero"))


def test_names_that_no_system_takes(model: Path) -> None:
    for name in ("n" * 300 + ".safetensors", "\ud800.safetensors", "a\0.safetensors"):
        (model / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(CheckpointError, match=r"not a plain name|surrogates") as caught:
            Checkpoint.open(model)
        assert len(str(caught.value)) < 1500
    for path in (Path("x" * 5000), Path("\ud800"), Path("a/" * 3000)):
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(path)
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            read_bytes(path)
        assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ('{"a": NaN}', "the value of 'a' is nan, which is no finite number"),
        ('{"a": [NaN]}', "the value of 'a' is nan"),
        ('{"a": Infinity}', "the value of 'a' is inf"),
        ('{"a": {"b": -1e999}}', "the value of 'b' is -inf"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "not valid JSON"),
        ('{"a": ' + "[" * DEEPEST_JSON + "]" * DEEPEST_JSON + "}", f"more than {DEEPEST_JSON} levels deep"),
        ('{"a": ' + "1" * 10_000 + "}", "not valid JSON"),
        ("\ufeff{}", "BOM"),
        ('{"' + "k" * 9000 + '": 1, "' + "k" * 9000 + '": 2}', "twice"),
    ],
)
def test_json_that_is_refused(model: Path, text: str, message: str) -> None:
    for name in ("config.json", INDEX):
        before = (model / name).read_text()
        (model / name).write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=message) as caught:
            Checkpoint.open(model)
        assert str(caught.value).startswith(str(model / name))
        assert len(str(caught.value)) < 1500
        (model / name).write_text(before)


def test_json_that_is_read(tmp_path: Path) -> None:
    # The open end of a range, as Mamba 2 has it.
    (tmp_path / "config.json").write_text(
        '\n{"time_step_limit": [0.0, Infinity], "\u00e9": {"a": null}}\n', encoding="utf-8"
    )
    read = read_json_object(tmp_path / "config.json")
    assert read == {"time_step_limit": [0.0, float("inf")], "\u00e9": {"a": None}}
    assert parse_json("[" * (DEEPEST_JSON - 1) + "]" * (DEEPEST_JSON - 1), "x")


def test_a_file_that_is_far_too_large(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # sparse: it takes no space
    with pytest.raises(CheckpointError, match=rf"config.json: has {2**40} bytes, more than"):
        read_json_object(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["[]", "{", "[" * 5000])
def test_a_record_that_was_edited_by_hand(tmp_path: Path, text: str) -> None:
    (tmp_path / "bmm_merge.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"bmm_merge\.json: .*carry out the merge again"):
        read_merge_record(tmp_path / "bmm_merge.json")


def test_texts_that_could_not_be_written_again(tmp_path: Path) -> None:
    for text in ('{"\\ud800": 1}', '{"a": "\\udfff"}', '{"a": ["\\ud800"]}'):
        with pytest.raises(CheckpointError, match="surrogates not allowed"):
            parse_json(text, "x.json")


def test_a_folder_whose_name_is_no_text(model: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"d\xff")
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("the file system takes no such name")
    shutil.move(model, odd / "base")
    shutil.copytree(odd / "base", odd / "expert")
    merged = merge(odd / "base", [odd / "expert"], output=odd / "out", alpha=float("inf"))
    assert "d\\udcff/expert" in (merged.path / "README.md").read_text(encoding="utf-8")
    assert torch.equal(Checkpoint.open(merged.path).load("w"), torch.ones(4, 3))

"""Every broken or hostile checkpoint is refused when it is opened, by a message with the name and the remedy."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from bmm_engine.checkpoint import Checkpoint, StateDictSource
from bmm_engine.errors import BmmError, CheckpointError, ConfigError, MissingTensorError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = save({"w": torch.ones(4, 3), "b": torch.ones(3)})

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"is empty \(0 bytes\); download it again"),
    "short": (b"\x01\x02", "announce a header .* the file has 2; download it again"),
    "truncated": (GOOD[:-5], rf"truncated: .* of {len(GOOD)} bytes, this one has {len(GOOD) - 5}; download it again"),
    "cut in the header": (GOOD[:40], "the file has 40; download it again"),
    "trailing bytes": (GOOD + b"xx", rf"{len(GOOD)} bytes, this one has {len(GOOD) + 2}; download it again"),
    "huge header": ((2**62).to_bytes(8, "little") + b"{}", f"header of {2**62} bytes.*download it again"),
    "web page": (b"<!DOCTYPE html>\n<html>" + b" " * 99, "is a web page .* download the raw file"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n",
        "git-lfs pointer.*git lfs pull",
    ),
    "no json": (raw(b"{nope}  "), "header is malformed .* download it again"),
    "no utf-8": (raw(b'{"\xff": 1}     '), "header is malformed .* download it again"),
    "nested too deep": (raw(b"[" * 100_000), "header is malformed .* download it again"),
    "no object": (raw([1, 2]), "not a JSON object; download it again"),
    "overlap": (raw({"a": entry(offsets=(0, 4)), "b": entry(offsets=(2, 6))}, bytes(6)), "not a valid .* of .* bytes"),
    "hole": (raw({"a": entry(offsets=(0, 4)), "b": entry(offsets=(8, 12))}, bytes(12)), "not a valid .* of .* bytes"),
    "twice": (raw(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", bytes(4)),
              "'a' is there twice"),
    "wrong length": (raw({"a": entry(shape=(3,))}, bytes(4)), r"'a' of shape \(3,\) and dtype F32 needs 12 bytes.* 4;"),
    "negative shape": (raw({"a": entry(shape=(-1,))}, bytes(4)), "header of tensor 'a' is malformed"),
    "shape is no list": (raw({"a": entry(shape="1")}, bytes(4)), "header of tensor 'a' is malformed"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "header of tensor 'a' is malformed"),
    "no entry": (raw({"a": 3}), "header of tensor 'a' is malformed"),
    "unknown dtype": (raw({"a": entry(dtype="F4", shape=(8,))}, bytes(4)), "'a' has the dtype 'F4', which is .*BF16"),
    "metadata is a list": (raw({"__metadata__": []}), "metadata in its header is no map"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "metadata in its header is no map"),
    "surrogate": (raw({"\ud800": entry()}, bytes(4)), "header is malformed .*surrogates"),
    "space in front": (raw(b" " + json.dumps({"a": entry()}).encode(), bytes(4)), "does not begin with"),
    "many dimensions": (raw({"a": entry(shape=(2,) + (1,) * 3000)}, bytes(4)), "needs 8 bytes"),
    "overflow": (raw({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}), "the shape is too large"),
    "dtype is no text": (raw({"a": entry(dtype=["F32"])}, bytes(4)), "'a' has the dtype"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_safetensors_file(tmp_path: Path, kind: str) -> None:
    content, message = BAD_FILES[kind]
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize("cut", range(0, len(GOOD), 7))
def test_every_truncation_is_noticed(tmp_path: Path, cut: int) -> None:
    (tmp_path / WEIGHTS).write_bytes(GOOD[:cut])
    with pytest.raises(CheckpointError, match="download it again"):
        Checkpoint.open(tmp_path)


def sharded(path: Path) -> dict[str, Any]:
    """Two good shards and their index, which is returned for a test to spoil."""
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, path / "one.safetensors")
    save_file({"c": torch.ones(4)}, path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (path / INDEX).write_text(json.dumps(index))
    return index


def spoil_name(name: str) -> Callable[[Path, dict[str, Any]], None]:
    def spoil(path: Path, index: dict[str, Any]) -> None:
        save_file({"c": torch.ones(4)}, path.parent / "outside.safetensors")
        index["weight_map"]["c"] = name.format(parent=path.parent)

    return spoil


def spoil_link(path: Path, index: dict[str, Any]) -> None:
    (path / "two.safetensors").rename(path.parent / "outside.safetensors")
    (path / "two.safetensors").symlink_to(path.parent / "outside.safetensors")


def spoil_missing(path: Path, index: dict[str, Any]) -> None:
    (path / "two.safetensors").unlink()


def spoil_absent_tensor(path: Path, index: dict[str, Any]) -> None:
    index["weight_map"]["d"] = "two.safetensors"


def spoil_wrong_shard(path: Path, index: dict[str, Any]) -> None:
    index["weight_map"]["b"] = "two.safetensors"


def spoil_duplicate(path: Path, index: dict[str, Any]) -> None:
    save_file({"b": torch.ones(3), "c": torch.ones(4)}, path / "two.safetensors")


def spoil_map(path: Path, index: dict[str, Any]) -> None:
    index["weight_map"] = {"a": 3}


def spoil_suffix(path: Path, index: dict[str, Any]) -> None:
    (path / "two.safetensors").rename(path / "two.npz")
    index["weight_map"]["c"] = "two.npz"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_name("../outside.safetensors"), r"'c'\) names the file '\.\./outside.safetensors', .* not a plain name"),
        (spoil_name("{parent}/outside.safetensors"), r"'c'\) names the file '/.*correct the name"),
        (spoil_name(".."), r"names the file '\.\.', .* not a plain name"),
        (spoil_name("a\0b"), "not a plain name"),
        (spoil_link, r"two\.safetensors: is a link to .*outside\.safetensors, outside .*; replace the link by a copy"),
        (spoil_missing, r"'two\.safetensors' for 1 tensors \(first 'c'\).*download the missing shard"),
        (spoil_absent_tensor, r"'d' in two\.safetensors, but that file does not hold it; download"),
        (
            spoil_wrong_shard,
            r"'b' in two\.safetensors, but that file does not hold it; it is in one\.safetensors; down",
        ),
        (spoil_duplicate, r"'b' is both in one\.safetensors and in two\.safetensors; .*download it again"),
        (spoil_map, "no weight_map from tensor names to file names; download it again"),
        (spoil_suffix, r"two\.npz: is neither .*save_pretrained"),
    ],
)
def test_bad_index(tmp_path: Path, spoil: Callable[[Path, dict[str, Any]], None], message: str) -> None:
    path = tmp_path / "model"
    path.mkdir()
    index = sharded(path)
    assert Checkpoint.open(path).names() == ("a", "b", "c")
    spoil(path, index)
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_index_or_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: .*download it again"):
        Checkpoint.open(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(GOOD)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: .*download it again"):
        Checkpoint.open(tmp_path)


def test_tensor_that_the_index_does_not_list_is_read(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    del index["weight_map"]["b"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert Checkpoint.open(tmp_path).names() == ("a", "b", "c")


def test_whole_file_comes_before_an_index_and_safetensors_before_bin(tmp_path: Path) -> None:
    torch.save({"from_bin": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert Checkpoint.open(tmp_path).names() == ("from_bin",)
    sharded(tmp_path)
    assert Checkpoint.open(tmp_path).names() == ("a", "b", "c")
    (tmp_path / WEIGHTS).write_bytes(GOOD)
    assert set(Checkpoint.open(tmp_path).names()) == {"w", "b"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no model.safetensors.*save_pretrained"),
        (["adapter_config.json", "adapter_model.safetensors"], "PEFT adapter.*merge_and_unload"),
        (["consolidated.safetensors", "notes.txt"], r"Found consolidated\.safetensors: pass the path"),
    ],
)
def test_directory_without_weights(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c", "missing.safetensors", "~/missing/x"])
def test_path_that_does_not_exist_is_not_asked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bmm_engine.checkpoint.hub.fetch", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="no such file or directory; check the path"):
        Checkpoint.open(name)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        Checkpoint.open(Path("organisation/name"))


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_text_that_is_no_path(name: str) -> None:
    with pytest.raises(CheckpointError, match="not the path of a checkpoint"):
        Checkpoint.open(name)


def test_revision_of_a_local_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no revision"):
        Checkpoint.open(tmp_path, revision="v2")


def test_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(tmp_path)


def test_file_that_changes_after_opening(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / WEIGHTS)
    torch.save({"w": torch.ones(4)}, tmp_path / "other.bin")
    for name in (WEIGHTS, "other.bin"):
        checkpoint = Checkpoint.open(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"x")
        with pytest.raises(CheckpointError, match="changed on disk"):
            checkpoint.load("w")
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match="No such file"):
            checkpoint.load("w")


class Hostile:
    """A pickle of this would create a file when it is loaded."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.victim), "w")


def test_bin_is_never_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    torch.save({"w": torch.ones(2), "x": Hostile(victim)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: cannot be read as plain tensors .*safetensors"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(victim)))
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        Checkpoint.open(tmp_path)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(1)], "holds a list, not a state dict"),
        ({"state_dict": {"w": torch.ones(1)}}, "entry 'state_dict' is a dict, not a tensor; pass the flat state dict"),
        ({"w": torch.eye(3).to_sparse()}, "'w' is .*sparse.*dense"),
    ],
)
def test_bin_that_holds_something_else(tmp_path: Path, value: Any, message: str) -> None:
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_bin_is_read(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"w": shared, "tied": shared, "t": shared.t(), "h": torch.ones(2).half()}
    torch.save(tensors, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"last": torch.ones(5)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = dict.fromkeys(tensors, "pytorch_model-00001-of-00002.bin")
    weight_map["last"] = "pytorch_model-00002-of-00002.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names() == ("w", "t", "h", "last")
    assert checkpoint.aliases == {"tied": "w"}
    for name in ("w", "last", "tied", "t"):
        expected = {**tensors, "last": torch.ones(5)}[name]
        loaded = checkpoint.load(name)
        assert torch.equal(loaded, expected)
        assert loaded.is_contiguous()
    assert torch.equal(checkpoint.load("t", slice(1, 2)), shared.t()[1:2])
    assert (
        str(tmp_path) not in Path("/proc/self/maps").read_text()
    )  # what is mapped and cut meanwhile would end the process
    checkpoint.load("w").zero_()
    assert torch.equal(checkpoint.load("w"), shared)


def test_bin_of_odd_layouts_is_read(tmp_path: Path) -> None:
    whole = torch.arange(60.0).reshape(5, 12)
    tensors = {
        "inner": whole[1:4, 2:9],
        "turned": whole.t()[3:],
        "steps": whole[::2, ::3],
        "wide": torch.ones(3, 1).expand(3, 4),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "half": torch.arange(7).bfloat16()[2:],
        "whole numbers": torch.arange(9).reshape(3, 3),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint.open(tmp_path)
    for name, right in tensors.items():
        found = checkpoint.load(name)
        assert found.dtype == right.dtype
        assert torch.equal(found, right)
        for rows in (slice(0, 2), slice(1, 2), slice(2, 99), slice(2, 1)) if right.dim() else ():
            assert torch.equal(checkpoint.load(name, rows), right[rows])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("compressed", "its record '.*' is compressed"),
        ("turned", "written on a machine of another byte order"),
        ("short", "'w' lies in no record of the file"),
    ],
)
def test_bin_whose_bytes_are_not_its_tensors(tmp_path: Path, spoil: str, message: str) -> None:
    torch.save({"w": torch.ones(64)}, tmp_path / "right.bin")
    with zipfile.ZipFile(tmp_path / "right.bin") as right, zipfile.ZipFile(tmp_path / "wrong.bin", "w") as wrong:
        for entry in right.infolist():
            content = right.read(entry)
            if spoil == "turned" and entry.filename.endswith("byteorder"):
                content = b"big" if sys.byteorder == "little" else b"little"
            if spoil == "short" and entry.filename.endswith("data/0"):
                content = content[:-8]
            kind = zipfile.ZIP_DEFLATED if spoil == "compressed" else zipfile.ZIP_STORED
            wrong.writestr(entry.filename, content, compress_type=kind)
    assert torch.equal(Checkpoint.open(tmp_path / "right.bin").load("w"), torch.ones(64))
    with pytest.raises(CheckpointError, match=rf"wrong\.bin: .*{message}.*save it as safetensors"):
        Checkpoint.open(tmp_path / "wrong.bin")


def test_legacy_bin_without_zip_names_the_remedy(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="save it as safetensors"):
        Checkpoint.open(tmp_path)


def test_state_dict_entries(tmp_path: Path) -> None:
    for state_dict, message in (
        ({"w": [1.0]}, "expert 2: entry 'w' is a list"),
        ({3: torch.ones(1)}, "expert 2: entry 3 is a Tensor"),
        ({"w": torch.empty(2, device="meta")}, "expert 2: tensor 'w' is on the meta device; materialise it"),
    ):
        with pytest.raises(CheckpointError, match=message):
            StateDictSource(state_dict, label="expert 2")  # type: ignore[arg-type]


def test_missing_tensor_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(GOOD)
    checkpoint = Checkpoint.open(tmp_path, label="base")
    assert issubclass(MissingTensorError, BmmError)
    for method in (checkpoint.load, checkpoint.spec):
        with pytest.raises(MissingTensorError, match=r"base: holds no tensor 'model\.w'"):
            method("model.w")
    assert "w" in checkpoint
    assert "model.w" not in checkpoint

"""Models on the hub, against a cache folder on disk and a client that is told what to answer."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import save_file

from bmm_engine.checkpoint import Checkpoint, input_record
from bmm_engine.checkpoint.hub import looks_like_hub_id
from bmm_engine.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder as the client lays it out: files are links into `blobs`."""
    repository = tmp_path / "cache" / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    save_file({"w": torch.ones(3)}, repository / "blobs" / "1111")
    (repository / "blobs" / "2222").write_text('{"hidden_size": 3}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/1111")
    (snapshot / "config.json").symlink_to("../../blobs/2222")
    return tmp_path / "cache"


def test_cached_snapshot(cache: Path) -> None:
    checkpoint = Checkpoint.open("org/name", cache_dir=cache, local_files_only=True)
    assert (checkpoint.label, checkpoint.hub_id, checkpoint.revision) == ("org/name", "org/name", COMMIT)
    assert checkpoint.config == {"hidden_size": 3}
    assert torch.equal(checkpoint.load("w"), torch.ones(3))
    record = input_record("base", checkpoint)
    assert (record["source"], record["revision"]) == ("org/name", COMMIT)
    assert set(record["files"]) == {"model.safetensors", "config.json"}
    by_path = Checkpoint.open(checkpoint.path)
    assert (by_path.hub_id, by_path.revision) == (None, None)


def test_link_out_of_the_cache_of_one_model(cache: Path) -> None:
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    save_file({"w": torch.ones(3)}, cache / "elsewhere")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../elsewhere")
    with pytest.raises(CheckpointError, match=r"is a link to .*elsewhere, outside .*models--org--name"):
        Checkpoint.open("org/name", cache_dir=cache, local_files_only=True)


def test_nothing_cached(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'org/other' \(revision v2\): no such directory, and .* local cache"):
        Checkpoint.open("org/other", cache_dir=tmp_path, local_files_only=True, revision="v2")


def hub_error(kind: type[Exception]) -> Exception:
    return kind("from the hub", response=SimpleNamespace(headers={}, request=None))  # type: ignore[call-arg]


def answer_info(monkeypatch: pytest.MonkeyPatch, answer: Exception | list[str]) -> None:
    def model_info(self: object, *_: Any, **__: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in answer])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            RepositoryNotFoundError,
            r"'org/name' \(revision main\): no such directory, and no such model on the hub; correct",
        ),
        (GatedRepoError, "access to this model is restricted; accept its terms"),
        (RevisionNotFoundError, "the model exists on the hub, this revision does not; check `revision`"),
    ],
)
def test_answers_of_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str) -> None:
    answer_info(monkeypatch, hub_error(kind))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open("org/name", cache_dir=cache)  # although it is cached: the hub's word counts


class TransportError(Exception):
    """Like those of an HTTP library that derive from no built-in error but Exception."""


@pytest.mark.parametrize("error", [OSError("no route"), TransportError("no name service")])
def test_no_connection(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    answer_info(monkeypatch, error)
    with caplog.at_level(logging.WARNING):
        assert Checkpoint.open("org/name", cache_dir=cache).names() == ("w",)
    assert f"the hub cannot be reached ({error}); looking in the local cache" in caplog.text
    with pytest.raises(CheckpointError, match=r"local cache does not hold it.*; connect to the network"):
        Checkpoint.open("org/other", cache_dir=cache)


@pytest.mark.parametrize(
    ("names", "wanted", "unwanted"),
    [
        (
            [
                "model.safetensors",
                "pytorch_model.bin",
                "onnx/model.safetensors",
                "config.json",
                "sentencepiece.bpe.model",
            ],
            {"*.safetensors", "config.json", "sentencepiece.bpe.model"},
            {"pytorch_model*.bin"},
        ),
        (
            ["pytorch_model.bin", "onnx/model.safetensors", "config.json", "LICENSE", "tf_model.h5", "README.md"],
            {"pytorch_model*.bin", "config.json", "LICENSE"},
            {"*.safetensors", "tf_model.h5", "README.md"},
        ),
        (
            [
                *("model.safetensors", "onnx/model.safetensors", "modules.json", "2_Dense/model.safetensors"),
                *("2_Dense/pytorch_model.bin", "2_Dense/config.json", "modeling_x.py", "code/[a].py"),
            ],
            {"modules.json", "2_Dense/model.safetensors", "2_Dense/config.json", "modeling_x.py", "code/[[]a].py"},
            {"2_Dense/pytorch_model.bin"},
        ),
    ],
)
def test_only_the_weights_that_are_read_are_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], wanted: set[str], unwanted: set[str]
) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(cache / "models--org--name" / "snapshots" / COMMIT)

    answer_info(monkeypatch, names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    Checkpoint.open("org/name", cache_dir=cache, revision="v2")
    assert (asked["hub_id"], asked["revision"], asked["local_files_only"]) == ("org/name", "v2", False)
    assert wanted <= set(asked["allow_patterns"])
    assert not unwanted & set(asked["allow_patterns"])
    assert "onnx/*" in asked["ignore_patterns"]


def test_failing_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError("connection reset")

    answer_info(monkeypatch, ["model.safetensors"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"the download failed \(connection reset\); try again"):
        Checkpoint.open("org/name", cache_dir=cache)


@pytest.mark.parametrize("text", ["gpt2", "org/name", "Org-1/name.v2_x"])
def test_hub_ids(text: str) -> None:
    assert looks_like_hub_id(text)


@pytest.mark.parametrize(
    "text", ["", "/a", "./a", "../a", "~/a", "a/", "a/b/c", "a b", ".hidden", "x.safetensors", "a/x.bin", "a\\b", "a\n"]
)
def test_what_is_no_hub_id(text: str) -> None:
    assert not looks_like_hub_id(text)


def test_import_is_light() -> None:
    code = "import sys, bmm_engine.checkpoint; print({'transformers', 'huggingface_hub', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

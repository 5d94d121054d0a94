"""Checkpoints of transformers models: read, written as one file and as shards, loaded again with from_pretrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bmm_engine.checkpoint import (
    RECORD_FILENAME,
    Checkpoint,
    CheckpointWriter,
    input_record,
    merge_record,
    model_card,
    open_source,
)
from bmm_engine.errors import CheckpointError

transformers = pytest.importorskip("transformers")


SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny_llama(tied: bool) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied))


def tiny_bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, tie_word_embeddings=True))


MODELS = {"llama": lambda: tiny_llama(False), "llama tied": lambda: tiny_llama(True), "bert": tiny_bert}


def copy_checkpoint(source: Checkpoint, destination: Path, max_shard_bytes: int) -> Path:
    specs = [source.spec(name) for name in source.names()]
    with CheckpointWriter(destination, specs, max_shard_bytes=max_shard_bytes) as writer:
        for name in source.names():
            writer.write(name, source.load(name))
        writer.copy_sidecars(source)
        return writer.commit()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("kind", MODELS)
def test_from_pretrained_loads_what_is_written(tmp_path: Path, kind: str, max_shard_bytes: int) -> None:
    model = MODELS[kind]().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    source = Checkpoint.open(tmp_path / "in")
    path = copy_checkpoint(source, tmp_path / "out", max_shard_bytes)
    assert (path / "model.safetensors.index.json").exists() == (max_shard_bytes == 4000)
    assert (path / "generation_config.json").exists() == (tmp_path / "in" / "generation_config.json").exists()

    loaded, report = type(model).from_pretrained(path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, expected), (other, actual) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_disk_and_module_agree_on_names_and_ties(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "in")
    on_disk, in_memory = Checkpoint.open(tmp_path / "in"), open_source(model)
    assert set(on_disk.names()) == set(in_memory.names())
    assert on_disk.aliases == in_memory.aliases
    assert bool(on_disk.aliases) == (kind != "llama")
    assert on_disk.config is not None
    assert in_memory.config is not None
    assert on_disk.config["hidden_size"] == in_memory.config["hidden_size"] == 16


def test_shards_of_save_pretrained_are_read(tmp_path: Path) -> None:
    model = tiny_llama(False)
    model.save_pretrained(tmp_path / "in", max_shard_size="4KB")
    checkpoint = Checkpoint.open(tmp_path / "in")
    assert len(checkpoint.shard_sizes()) > 2
    files = [checkpoint.spec(name).file for name in checkpoint.names()]
    assert files == sorted(files)
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.load(name), tensor)


SIDECARS = {
    "config.json": "{}",
    "tokenizer.json": "t",
    "tokenizer_config.json": "t",
    "special_tokens_map.json": "t",
    "vocab.txt": "t",
    "merges.txt": "t",
    "spiece.model": "t",
    "chat_template.jinja": "t",
    "preprocessor_config.json": "t",
    "generation_config.json": "t",
}
LEFT_OUT = (
    "modeling_x.py",
    "README.md",
    "vocab.bin",
    "optimizer.pt",
    "other.safetensors",
    "x.index.json",
    RECORD_FILENAME,
)


def with_sidecars(path: Path) -> Checkpoint:
    tiny_bert().save_pretrained(path)
    for name in LEFT_OUT:
        (path / name).write_text("never copied")
    for name, text in SIDECARS.items():
        (path / name).write_text(text)
    return Checkpoint.open(path)


def sidecars_of(source: Checkpoint, destination: Path) -> dict[str, str]:
    path = copy_checkpoint(source, destination, 10**9)
    return {file.name: file.read_text() for file in path.iterdir() if file.suffix != ".safetensors"}


def test_sidecars(tmp_path: Path) -> None:
    source = with_sidecars(tmp_path / "in")
    assert sidecars_of(source, tmp_path / "out") == SIDECARS
    (tmp_path / "in" / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.Model"}}')
    copied = sidecars_of(Checkpoint.open(tmp_path / "in"), tmp_path / "remote_code")
    assert set(copied) == {*SIDECARS, "modeling_x.py"}


def test_sidecars_keep_what_was_written_first_and_give_way_to_what_comes_later(tmp_path: Path) -> None:
    source = with_sidecars(tmp_path / "in")
    with CheckpointWriter(tmp_path / "out", [source.spec(name) for name in source.names()]) as writer:
        writer.write_json("config.json", {"mine": 1})
        assert set(writer.copy_sidecars(source)) == set(SIDECARS) - {"config.json"}
        writer.write_text("vocab.txt", "mine")
        for name in source.names():
            writer.write(name, source.load(name))
        path = writer.commit()
    assert json.loads((path / "config.json").read_text()) == {"mine": 1}
    assert (path / "vocab.txt").read_text() == "mine"


def test_sidecar_links(tmp_path: Path) -> None:
    source = with_sidecars(tmp_path / "in")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in" / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"vocab\.json: is a link to .*secret, outside .*replace the link"):
        copy_checkpoint(source, tmp_path / "out", 10**9)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "secret"}
    (tmp_path / "in" / "vocab.json").unlink()
    (tmp_path / "in" / "vocab.json").symlink_to("vocab.txt")
    path = copy_checkpoint(source, tmp_path / "out", 10**9)
    assert (path / "vocab.json").read_text() == "t"
    assert not (path / "vocab.json").is_symlink()


def test_one_file_has_no_sidecars(tmp_path: Path) -> None:
    with_sidecars(tmp_path / "in")
    source = Checkpoint.open(tmp_path / "in" / "model.safetensors")
    assert sidecars_of(source, tmp_path / "out") == {}


def test_model_card_and_record_travel_with_the_model(tmp_path: Path) -> None:
    source = with_sidecars(tmp_path / "in")
    record = merge_record({"anchor": "ties"}, [input_record("base", source)], modules={"solved": 12})
    with CheckpointWriter(tmp_path / "out", [source.spec(name) for name in source.names()]) as writer:
        for name in source.names():
            writer.write(name, source.load(name))
        writer.write_json(RECORD_FILENAME, record)
        writer.write_text("README.md", model_card(record, name="merged", architecture="BertForMaskedLM"))
        path = writer.commit()
    assert json.loads((path / RECORD_FILENAME).read_text()) == record
    assert "# merged" in (path / "README.md").read_text()

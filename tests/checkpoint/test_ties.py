"""Which names are reported as tied, and to what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bmm_engine.checkpoint import Checkpoint, StateDictSource, open_source

EMBEDDING = torch.arange(12.0).reshape(4, 3)


def opened(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None) -> Checkpoint:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(path)


@pytest.mark.parametrize(
    ("tied", "holder", "companion"),
    [
        ("lm_head.weight", "model.embed_tokens.weight", None),
        ("lm_head.weight", "transformer.wte.weight", None),
        ("lm_head.weight", "model.language_model.embed_tokens.weight", None),
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias", None),
        ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight", "lm_head.bias"),
        ("encoder.embed_tokens.weight", "shared.weight", None),
    ],
)
def test_known_pairs(tmp_path: Path, tied: str, holder: str, companion: str | None) -> None:
    tensors = {holder: EMBEDDING} | ({companion: torch.ones(4)} if companion else {})
    checkpoint = opened(tmp_path, tensors, {"tie_word_embeddings": True})
    assert checkpoint.aliases[tied] == holder
    assert tied in checkpoint
    assert tied not in checkpoint.names()
    assert torch.equal(checkpoint.load(tied, slice(1, 3)), EMBEDDING[1:3])
    assert (checkpoint.spec(tied).name, checkpoint.spec(tied).shape) == (tied, (4, 3))


@pytest.mark.parametrize(
    ("config", "is_tied"),
    [
        (None, False),
        ({}, False),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": "yes"}, False),
        ({"text_config": None}, False),
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_config_decides(tmp_path: Path, config: dict[str, Any] | None, is_tied: bool) -> None:
    checkpoint = opened(tmp_path, {"model.embed_tokens.weight": EMBEDDING}, config)
    assert ("lm_head.weight" in checkpoint) is is_tied


def test_both_stored(tmp_path: Path) -> None:
    embedding = EMBEDDING.clone()
    embedding[0, 0] = float("nan")
    tensors = {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding}
    checkpoint = opened(tmp_path, tensors, {"tie_word_embeddings": True})
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert checkpoint.names() == ("model.embed_tokens.weight",)


def test_both_stored_but_different(tmp_path: Path) -> None:
    for head in (EMBEDDING + 1, EMBEDDING.half(), EMBEDDING[:3]):
        tensors = {"lm_head.weight": head, "model.embed_tokens.weight": EMBEDDING}
        checkpoint = opened(tmp_path, tensors, {"tie_word_embeddings": True})
        assert checkpoint.aliases == {}
        assert set(checkpoint.names()) == set(tensors)
        assert torch.equal(checkpoint.load("lm_head.weight"), head)


def test_comparison_goes_on_after_the_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmm_engine.checkpoint.ties._COMPARE_BYTES", 24)
    head = EMBEDDING.clone()
    head[3, 2] += 1
    tensors = {"lm_head.weight": head, "model.embed_tokens.weight": EMBEDDING}
    assert opened(tmp_path, tensors, {"tie_word_embeddings": True}).aliases == {}


def test_no_holder_or_no_single_one(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    assert opened(tmp_path, {"layer.weight": EMBEDDING}, tied).aliases == {}
    # An encoder without a masked-language head has nothing tied.
    assert opened(tmp_path, {"embeddings.word_embeddings.weight": EMBEDDING}, tied).aliases == {}
    two = {"a.embed_tokens.weight": EMBEDDING, "b.embed_tokens.weight": EMBEDDING}
    assert "lm_head.weight" not in opened(tmp_path, two, tied)


def test_state_dict_ties_are_shared_memory() -> None:
    linear = torch.nn.Linear(3, 4)
    model = torch.nn.ModuleDict({"embedding": linear, "head": torch.nn.Linear(3, 4)})
    model["head"].weight = linear.weight
    source = open_source(model)
    assert source.aliases == {"head.weight": "embedding.weight"}
    assert source.names() == ("embedding.weight", "embedding.bias", "head.bias")
    assert "head.weight" in source
    assert torch.equal(source.load("head.weight"), linear.weight)


def test_views_of_one_storage_are_not_ties() -> None:
    fused = torch.arange(12.0).reshape(3, 4)
    views = {"q": fused[0:1], "k": fused[1:2], "square": fused[:, :3], "transposed": fused[:, :3].t()}
    source = StateDictSource(views | {"none": torch.empty(0), "none too": torch.empty(0)})
    assert source.aliases == {}

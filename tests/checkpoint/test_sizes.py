"""A config that describes far more than the files hold is refused before anything of that size is built."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from bmm_engine.checkpoint import Checkpoint
from bmm_engine.errors import CheckpointError
from bmm_engine.models.bounds import Held
from bmm_engine.models.building import load_config, meta_model, weightless_model
from bmm_engine.pipeline.inspection import describe_checkpoint
from bmm_engine.pipeline.models import live_model
from tests.tiny import make_base, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_base("llama"), tmp_path_factory.mktemp("sizes") / "llama")


def spoiled(model: Path, folder: Path, key: str, value: object) -> Path:
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    return folder


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_labels",
        "head_dim",
    ],
)
@pytest.mark.parametrize("value", [10**9, 10**18])
def test_a_size_that_the_files_do_not_account_for(model: Path, tmp_path: Path, key: str, value: int) -> None:
    path = spoiled(model, tmp_path, key, value)
    checkpoint = Checkpoint.open(path)
    held = Held.of(checkpoint.shapes())
    assert str(path) in str(describe_checkpoint(str(path))["linear_modules_unknown"])
    for build in (
        lambda: meta_model(path, held),
        lambda: weightless_model(path, torch.float32, held),
        lambda: live_model(checkpoint),
    ):
        with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
            build()
        assert len(str(caught.value)) < 1500


def test_the_message_has_both_sizes(model: Path, tmp_path: Path) -> None:
    path = spoiled(model, tmp_path, "vocab_size", 10**9)
    held = Held.of(Checkpoint.open(path).shapes())
    with pytest.raises(
        CheckpointError,
        match=rf"shape \(1000000000, 16\).*the files hold {held.tensors} tensors of {held.elements} elements",
    ):
        meta_model(path, held)
    path = spoiled(model, tmp_path, "num_hidden_layers", 10**9)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 1000000000, while the files hold .* tensors"):
        load_config(path, held)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", "4"),
        ("hidden_act", 3),
        ("model_type", [[1]]),
        ("architectures", {"a": 1}),
        ("pad_token_id", 10**6),
        ("rope_parameters", "x"),
    ],
)
def test_a_value_of_another_type(model: Path, tmp_path: Path, key: str, value: object) -> None:
    path = spoiled(model, tmp_path, key, value)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        meta_model(path, Held.of(Checkpoint.open(path).shapes()))


def test_inspect_says_where_config_and_files_differ(model: Path, tmp_path: Path) -> None:
    found = describe_checkpoint(str(spoiled(model, tmp_path, "intermediate_size", 80)))
    assert found["linear_modules"] == {}
    assert (
        "'model.layers.0.mlp.gate_proj.weight' with shape (80, 16), the files hold (40, 16)"
        in found["linear_modules_unknown"]
    )


def test_a_checkpoint_of_a_few_tensors_may_have_a_whole_architecture(model: Path) -> None:
    built = meta_model(model, Held.of({"norm.weight": (16,)}))
    assert sum(p.numel() for p in built.parameters()) > 1000
    assert load_config(model, Held.of({})).vocab_size == 60

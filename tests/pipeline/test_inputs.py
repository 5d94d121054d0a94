"""Inputs that a model cannot read are refused by the name of their file, before it runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bmm_engine import collect_grams
from bmm_engine.checkpoint import Checkpoint
from bmm_engine.errors import (
    BmmError,
    CheckpointError,
    CollectionError,
    ConfigError,
    EmptyCalibrationError,
    NonFiniteWeightError,
)
from bmm_engine.models.inputs import check_inputs
from bmm_engine.pipeline.measure import collect_from_checkpoint
from bmm_engine.pipeline.models import live_model
from bmm_engine.recipe.sections import CalibrationRecipe
from bmm_engine.statistics.calibration import read_calibration
from tests.tiny import VOCABULARY, make_base, make_batches, save
from tests.words import WORDS, tokenizer_in

IDS = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for architecture in ("bert", "gpt2", "llama"):
        tokenizer_in(save(make_base(architecture), folder / architecture))
    return folder


def changed(row: int, column: int, value: int) -> torch.Tensor:
    ids = IDS.clone()
    ids[row, column] = value
    return ids


BAD = {
    "too large": ({"input_ids": changed(1, 2, VOCABULARY)}, r"numbers between \d+ and 60, .* has an embedding for 0 to 59"),
    "negative": ({"input_ids": changed(1, 2, -1)}, "numbers between -1 and"),
    "floats": ({"input_ids": IDS.float()}, "input_ids is of torch.float32; give whole numbers"),
    "odd name": ({"[/b]": IDS}, r"has no input called '\[/b\]'; it takes input_ids, .*Rename"),
    "long name": ({"n" * 5000: IDS}, "has no input called 'nnn"),
    "an option": ({"input_ids": IDS, "use_cache": MASK}, "has no input called 'use_cache'"),
    "self": ({"input_ids": IDS, "self": MASK}, "has no input called 'self'"),
    "no ids": ({"attention_mask": MASK}, "holds attention_mask, and not the 'input_ids' that .* reads"),
    "one dimension": ({"input_ids": IDS[0]}, r"input_ids has shape \(9,\)"),
    "no columns": ({"input_ids": IDS[:, :0]}, r"input_ids has shape \(4, 0\)"),
    "mask of another shape": ({"input_ids": IDS, "attention_mask": MASK[:, 1:]}, r"shape \(4, 8\), input_ids \(4, 9\)"),
    "mask of twos": ({"input_ids": IDS, "attention_mask": MASK * 2}, "attention_mask holds values between 2 and 2"),
    "all padding": ({"input_ids": IDS, "attention_mask": MASK * 0}, "all padding"),
    "samples differ": ({"input_ids": IDS, "attention_mask": MASK[1:]}, "differ in their number of samples"),
    "scalar": ({"input_ids": torch.tensor(3)}, "has no dimensions"),
    "nothing": ({"input_ids": IDS[:0]}, "holds no samples"),
    "three dimensions": ({"input_ids": IDS[..., None]}, r"cannot run on a batch of input_ids \(4, 9, 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("kind", BAD)
def test_ready_made_inputs(models: Path, tmp_path: Path, architecture: str, kind: str) -> None:
    if (architecture, kind) == ("gpt2", "three dimensions"):
        pytest.skip("GPT-2 flattens them")
    tensors, message = BAD[kind]
    path = tmp_path / "rows.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(BmmError, match=message) as caught:
        collect_from_checkpoint(str(models / architecture), read_calibration(path), CalibrationRecipe())
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_texts_longer_than_the_positions(models: Path, tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("the cat sat\n" + " ".join(WORDS * 3) + "\n")
    data = read_calibration(path)
    model = str(models / architecture)
    with pytest.raises(ConfigError, match=r"rows\.txt: a sample has 48 tokens, .* has 32 positions.*--max-length 32"):
        collect_from_checkpoint(model, data, CalibrationRecipe())
    assert collect_from_checkpoint(model, data, CalibrationRecipe(max_length=32)).modules


def test_rotary_positions_have_no_end(models: Path, tmp_path: Path) -> None:
    save_file({"input_ids": IDS.repeat(1, 6)}, tmp_path / "rows.safetensors")
    found = collect_from_checkpoint(
        str(models / "llama"), read_calibration(tmp_path / "rows.safetensors"), CalibrationRecipe()
    )
    right = collect_grams(make_base("llama"), [{"input_ids": IDS.repeat(1, 6)}])
    for module in right.modules:
        assert torch.equal(found.get(module).total, right.get(module).total)


def test_what_a_tokenizer_makes_need_not_be_named(models: Path) -> None:
    live = make_base("llama")
    batch = {"input_ids": IDS, "token_type_ids": MASK}  # such tokenizers are about; the model passes over it
    check_inputs(live, batch, "rows.txt", ready=False)
    with pytest.raises(ConfigError, match="no input called 'token_type_ids'"):
        check_inputs(live, batch, "rows.txt", ready=True)


@pytest.mark.parametrize(("offset", "padding"), [(2, None), (None, 1)])
def test_positions_that_begin_later(offset: int | None, padding: int | None) -> None:
    """BART and OPT count from 2, RoBERTa from behind the padding's row."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_positions = nn.Embedding(12, 4, padding_idx=padding)
            if offset is not None:
                self.embed_positions.offset = offset  # type: ignore[assignment]
            self.vision_position_embedding = nn.Embedding(3, 4)

    check_inputs(Model(), {"input_ids": IDS.repeat(1, 2)[:, :10]}, "x", ready=False)
    with pytest.raises(ConfigError, match="11 tokens, Model has 10 positions"):
        check_inputs(Model(), {"input_ids": IDS.repeat(1, 2)[:, :11]}, "x", ready=False)


def test_a_live_model_that_refuses_its_batch() -> None:
    with pytest.raises(
        CollectionError, match=r"cannot run on a batch of input_ids \(4, 9\), position_ids \(2, 7\) \(RuntimeError"
    ):
        collect_grams(make_base("bert"), [{"input_ids": IDS, "position_ids": torch.zeros(2, 7, dtype=torch.long)}])


def test_heads_need_no_labels_that_fit() -> None:
    """Only what the body reads is measured, so a pass ends before the head."""
    base = make_base("bert")
    with_labels = collect_grams(base, [{"input_ids": IDS, "labels": torch.zeros(2, dtype=torch.long)}])
    without = collect_grams(base, [{"input_ids": IDS}])
    assert all(torch.equal(gram.total, without.grams[name].total) for name, gram in with_labels.grams.items())


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"rows{suffix}")
    with pytest.raises(BmmError, match="pipe"):
        read_calibration(tmp_path / f"rows{suffix}")
    (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
    with pytest.raises(BmmError, match=f"loop{suffix}"):
        read_calibration(tmp_path / f"loop{suffix}")
    with pytest.raises(ConfigError, match="is too long"):
        read_calibration(tmp_path / ("n" * 300 + suffix))


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(20), None])
def test_a_picture_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    image = pytest.importorskip("PIL.Image")
    model = save(make_base("vit"), tmp_path / "vit")
    settings = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (model / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", **settings})
    )
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    image.new("RGB", (16, 16)).save(pictures / "0.png")
    if content is None:
        os.mkfifo(pictures / "1.png")
    else:
        (pictures / "1.png").write_bytes(content)
    with pytest.raises(BmmError, match=r"1\.png"):
        collect_from_checkpoint(str(model), read_calibration(pictures), CalibrationRecipe())


def test_a_file_that_was_cut_before_it_is_run(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "bert", tmp_path / "bert")
    checkpoint = Checkpoint.open(tmp_path / "bert")
    os.truncate(tmp_path / "bert" / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed on disk"):
        live_model(checkpoint)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_a_file_that_lacks_a_tensor_is_not_run(models: Path, tmp_path: Path, architecture: str) -> None:
    shutil.copytree(models / architecture, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(("query.weight", "c_attn.weight", "q_proj.weight")))
    save_file({n + "_" * (n == name): t for n, t in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model: its files lack 1 tensors .*the first is"):
        live_model(Checkpoint.open(tmp_path / "model"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeightError, match=r"model: the weight '.*' holds NaN or infinity in float32"):
        live_model(Checkpoint.open(tmp_path / "model"))


def test_an_empty_mask_is_told_of_its_file(models: Path, tmp_path: Path) -> None:
    save_file({"input_ids": IDS, "attention_mask": MASK * 0}, tmp_path / "rows.safetensors")
    with pytest.raises(EmptyCalibrationError, match=r"rows\.safetensors: .*all padding"):
        collect_from_checkpoint(
            str(models / "bert"), read_calibration(tmp_path / "rows.safetensors"), CalibrationRecipe()
        )


def test_batches_that_fit_pass() -> None:
    for architecture in ("bert", "gpt2", "llama", "vit"):
        for batch in make_batches(architecture, 0):
            check_inputs(make_base(architecture), batch, "x", ready=True)

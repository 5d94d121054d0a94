"""Whose tokenizer reads an expert's texts: its own, its adapter's, the base's where it was saved without one; never one that is made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from bmm_engine.checkpoint import Checkpoint
from bmm_engine.checkpoint.tokenizer import has_tokenizer
from bmm_engine.errors import CheckpointError
from bmm_engine.pipeline.models import open_models, preparing_folder
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.pipeline.statistics import calibration_batches
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.statistics.calibration import load_tokenizer
from tests.tiny import family, make_base, save
from tests.words import ENDLESS, WORDS, tokenizer_in

NAMES = ("base", "expert-0", "expert-1")


def project(folder: Path, *with_tokenizer: str, mode: str = "sequential") -> Recipe:
    family("bert", folder)
    for name in with_tokenizer:
        tokenizer_in(folder / name, special=ENDLESS)
    for name in NAMES[1:]:
        lines = [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 5]) for i in range(20)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    experts = [{"model": str(folder / n), "calibration": str(folder / f"{n}.txt")} for n in NAMES[1:]]
    return Recipe.parse({"base": str(folder / "base"), "experts": experts, "mode": mode, "output_weights": "none"})


@pytest.mark.parametrize("mode", ["sequential", "plain"])
def test_an_expert_without_a_tokenizer_is_read_with_the_bases(tmp_path: Path, mode: str) -> None:
    whole = project(tmp_path / "whole", *NAMES, mode=mode)
    bare = project(tmp_path / "bare", "base", "expert-1", mode=mode)
    # What remains of a tokenizer whose vocabulary was not saved.
    (tmp_path / "bare" / "expert-0" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    said: list[str] = []
    merged = [
        run_recipe(recipe, tmp_path / name, report=said.append, progress=False).path
        for name, recipe in (("one", whole), ("two", bare))
    ]
    told = [line for line in said if "tokenizer" in line]
    assert told == [
        f"{tmp_path}/bare/expert-0: has no tokenizer of its own; its data are read with that of the base, {tmp_path}/bare/base"
    ]
    one, two = (Checkpoint.open(str(path)) for path in merged)
    assert all(torch.equal(one.load(name), two.load(name)) for name in one.names())


def test_without_any_tokenizer_it_is_refused_with_the_remedy(tmp_path: Path) -> None:
    recipe = project(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"expert-0: has no tokenizer: none of its files holds a vocabulary.*Copy the base's tokenizer",
    ):
        run_recipe(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    # The remedy is right.
    for name in NAMES[1:]:
        tokenizer_in(tmp_path / name, special=ENDLESS)
    assert run_recipe(recipe, tmp_path / "out", progress=False).path is not None


def test_images_of_an_expert_without_a_processor(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTImageProcessor

    _, _, base, experts = family("vit", tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(base)
    for i in range(3):
        for name in ("expert-0", "expert-1"):
            (tmp_path / f"pictures-{name}").mkdir(exist_ok=True)
            Image.new("RGB", (20, 20), (i * 50, 10, 0)).save(tmp_path / f"pictures-{name}" / f"{i}.png")
    own = [{"model": str(e), "calibration": str(tmp_path / f"pictures-{e.name}")} for e in experts]
    recipe = Recipe.parse({"base": str(base), "experts": own})
    said: list[str] = []
    batches = calibration_batches(recipe, open_models(recipe), said.append)
    assert batches[0][0]["pixel_values"].shape == (3, 3, 16, 16)
    assert (
        sum("has no image processor of its own; its data are read with that of the base" in line for line in said) == 2
    )


def test_an_adapter_brings_its_own(tmp_path: Path) -> None:
    from tests.checkpoint.test_adapter import pair, write

    base = save(make_base("llama"), tmp_path / "base")
    tokenizer_in(base)
    adapter = write(tmp_path / "adapter", pair("model.layers.0.self_attn.q_proj", 16, 16))
    recipe = Recipe.parse({"base": str(base), "experts": [str(adapter)]})
    models = open_models(recipe)
    assert preparing_folder(models.experts[0], models.base) == base
    tokenizer_in(adapter)
    assert preparing_folder(models.experts[0], models.base) == adapter


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "vocab.txt",
        "sentencepiece.bpe.model",
        "spiece.model",
        "tekken.json",
        "qwen.tiktoken",
        "source.spm",
    ],
)
def test_a_vocabulary_of_any_family_is_known(tmp_path: Path, name: str) -> None:
    assert not has_tokenizer(tmp_path)
    (tmp_path / name).write_text("")
    assert has_tokenizer(tmp_path)


def test_a_tokenizer_of_bytes_needs_no_file(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    assert has_tokenizer(tmp_path)
    assert len(load_tokenizer(tmp_path)("ab")["input_ids"]) == 3


def test_an_empty_tokenizer_is_refused(tmp_path: Path) -> None:
    save(make_base("bert"), tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer_in(tmp_path, words=())
    with pytest.raises(CheckpointError, match=r"knows no tokens but \[.*every text would be the same to it"):
        load_tokenizer(tmp_path)
    shutil.rmtree(tmp_path)
    tokenizer_in(tmp_path)
    assert "input_ids" in load_tokenizer(tmp_path)("the cat")
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]["cat"] == 4

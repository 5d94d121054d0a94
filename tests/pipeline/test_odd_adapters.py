"""Adapters with more tokens than their base, files that are no adapter PEFT would read, and adapters of another base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from bmm_engine.checkpoint import Checkpoint, open_adapter
from bmm_engine.errors import CheckpointError, ShapeMismatchError
from bmm_engine.pipeline.models import live_model, open_models
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from tests.checkpoint.test_adapter import pair, write
from tests.tiny import fine_tune, make_base, save

EMBED, HEAD, QUERY = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"


def untied() -> torch.nn.Module:
    config = make_base("llama").config
    config.tie_word_embeddings = False
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(config).eval()


def grown(folder: Path, *, save_style: str) -> tuple[Path, Path, Path]:
    """A base of 60 tokens, an adapter whose embeddings have 64, and the full model that the two are."""
    base = save(untied(), folder / "base")
    factors = {
        f"{QUERY}.{part}": t / 9
        for part, t in ((k.split(".", 4)[-1].split("q_proj.")[1], v) for k, v in pair(QUERY, 16, 16).items())
    }
    rows = {f"{EMBED}.weight": torch.randn(64, 16), f"{HEAD}.weight": torch.randn(64, 16)}
    names = ["embed_tokens", "lm_head"] if save_style == "modules_to_save" else None
    # With `save_embedding_layers` PEFT writes them and the config does not say so.
    adapter = write(
        folder / "adapter", {**factors, **rows}, lora_alpha=4, modules_to_save=names, base_model_name_or_path=str(base)
    )
    full = untied()
    full.resize_token_embeddings(64, mean_resizing=False)
    with torch.no_grad():
        a, b = factors[f"{QUERY}.lora_A.weight"], factors[f"{QUERY}.lora_B.weight"]
        full.get_parameter(f"{QUERY}.weight").add_((b.double() @ a.double()).float())
        for name, tensor in rows.items():
            full.get_parameter(name).copy_(tensor)
    return base, adapter, save(full, folder / "full")


@pytest.mark.parametrize("save_style", ["modules_to_save", "save_embedding_layers"])
@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_an_adapter_with_more_tokens_merges_as_the_full_model_does(tmp_path: Path, mode: str, save_style: str) -> None:
    base, adapter, full = grown(tmp_path, save_style=save_style)
    other = save(fine_tune(untied(), 5), tmp_path / "other")
    made = []
    for name, model in (("one", adapter), ("two", full)):
        recipe = Recipe.parse({"base": str(base), "experts": [str(model), str(other)], "vocabulary": mode})
        made.append(Checkpoint.open(run_recipe(recipe, tmp_path / name, progress=False).path))
    for name in made[1].names():
        torch.testing.assert_close(made[0].load(name), made[1].load(name), rtol=1e-5, atol=1e-5)
    rows = 64 if mode == "pad" else 60
    assert made[0].config["vocab_size"] == rows
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert loaded.get_output_embeddings().weight.shape[0] == rows
    with pytest.raises(
        ShapeMismatchError,
        match=r"\(60, 16\) in .*\(64, 16\) in .*adapter.*`vocabulary: crop`.*`vocabulary: pad` all 64",
    ):
        run_recipe(Recipe.parse({"base": str(base), "experts": [str(adapter)]}), tmp_path / "no", progress=False)


def test_it_runs_as_the_full_model_does(tmp_path: Path) -> None:
    base, adapter, full = grown(tmp_path, save_style="modules_to_save")
    models = open_models(Recipe.parse({"base": str(base), "experts": [str(adapter), str(full)]}))
    live = [live_model(source)[0].eval() for source in models.experts]
    tokens = torch.tensor([[3, 61, 5, 63]])
    with torch.no_grad():
        torch.testing.assert_close(live[0](tokens).logits, live[1](tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            [
                "lora_unet_down_blocks_0.lora_down.weight",
                "lora_unet_down_blocks_0.lora_up.weight",
                "lora_unet_down_blocks_0.alpha",
            ],
            "form of kohya",
        ),
        (
            ["lora_te_text_model_x.hada_w1_a", "lora_te_text_model_x.hada_w1_b", "lora_te_text_model_x.alpha"],
            "form of LyCORIS",
        ),
        (["lora_unet_x.lokr_w1", "lora_unet_x.lokr_w2"], "form of LyCORIS"),
        (["unet.down.attn.to_k.lora.down.weight", "unet.down.attn.to_k.lora.up.weight"], "form of diffusers"),
        (["unet.attn.processor.to_q_lora.down.weight", "unet.attn.processor.to_q_lora.up.weight"], "form of diffusers"),
        (
            ["base_model.model.a.q_proj.lora_A.weight", "base_model.model.a.q_proj.lora_B.weight"],
            "without the adapter_config.json",
        ),
        (["a.q_proj.lora_A.weight", "a.q_proj.lora_B.weight"], "without the adapter_config.json"),
    ],
)
@pytest.mark.parametrize("place", ["file", "folder", "model"])
def test_another_kind_of_adapter_is_called_by_its_name(tmp_path: Path, keys: list[str], words: str, place: str) -> None:
    base = save(make_base("llama"), tmp_path / "base")
    names = {"file": "x.safetensors", "folder": "adapter_model.safetensors", "model": "model.safetensors"}
    (tmp_path / "expert").mkdir()
    file = tmp_path / "expert" / names[place]
    save_file({key: torch.randn(4, 4) for key in keys}, file)
    expert = file if place == "file" else file.parent
    if place == "folder":
        words = "the weights of an adapter, but no adapter_config.json"
    with pytest.raises(CheckpointError, match=rf"expert.*{words}"):
        run_recipe(Recipe.parse({"base": str(base), "experts": [str(expert)]}), tmp_path / "out", progress=False)


def test_the_file_of_an_adapter_whose_folder_is_whole(tmp_path: Path) -> None:
    base = save(make_base("llama"), tmp_path / "base")
    adapter = write(tmp_path / "adapter", pair(QUERY, 16, 16))
    recipe = {"base": str(base), "experts": [str(adapter / "adapter_model.safetensors")]}
    with pytest.raises(
        CheckpointError, match=rf"is the weight file of a PEFT adapter .*; pass its folder, {adapter}, which has"
    ):
        run_recipe(Recipe.parse(recipe), tmp_path / "out", progress=False)
    run_recipe(Recipe.parse({**recipe, "experts": [str(adapter)]}), tmp_path / "out", progress=False)


def test_a_model_with_such_names_among_its_own_is_a_model(tmp_path: Path) -> None:
    """Some are made with adapters as a part of the architecture."""
    tensors = {
        "q.base_layer.weight": torch.randn(4, 4),
        "q.lora_A.speech.weight": torch.randn(2, 4),
        "x.alpha": torch.ones(1),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert set(Checkpoint.open(tmp_path).names()) == set(tensors)


@pytest.mark.parametrize(
    "name", ["new_embeddings.safetensors", "non_lora_trainables.bin", "learned_embeds.bin", "extra.safetensors"]
)
def test_trained_embeddings_beside_an_adapter_are_not_lost_in_silence(tmp_path: Path, name: str) -> None:
    base = save(make_base("llama"), tmp_path / "base")
    adapter = write(tmp_path / "adapter", pair(QUERY, 16, 16))
    tensors = {"model.embed_tokens.weight": torch.randn(2, 16)}
    save_file(tensors, adapter / name) if name.endswith("safetensors") else torch.save(tensors, adapter / name)
    with pytest.raises(
        CheckpointError,
        match=rf"{name}: holds trained embeddings or other tensors.*the merge would lose them.*move the file away",
    ):
        open_adapter(adapter, Checkpoint.open(base))
    (adapter / name).unlink()
    for left in ("optimizer.bin", "rng_state_0.pt", "training_args.bin", "adapter_model.bin"):
        (adapter / left).write_text("x")
    open_adapter(adapter, Checkpoint.open(base))


def test_a_value_head_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save(make_base("llama"), tmp_path / "base")
    adapter = write(tmp_path / "adapter", pair(QUERY, 16, 16))
    save_file({"v_head.summary.weight": torch.randn(1, 16)}, adapter / "value_head.safetensors")
    open_adapter(adapter, Checkpoint.open(base))
    assert (
        "value_head.safetensors: is not part of the adapter (tensors v_head.summary.weight), and left out"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("trained_on", "said"),
    [
        ("base", False),
        ("org/Base", False),
        ("somewhere/the-base/", False),
        ("org/llama-7b", True),
        ("org/other", True),
        (None, False),
    ],
)
def test_an_adapter_of_another_base_is_said(
    tmp_path: Path, trained_on: str | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    base = save(make_base("llama"), tmp_path / "base")
    adapter = write(tmp_path / "adapter", pair(QUERY, 16, 16), base_model_name_or_path=trained_on)
    open_adapter(adapter, Checkpoint.open(base))
    assert (f"was trained on {trained_on!r}, and is applied to {base}" in caplog.text) is said


def test_a_base_that_is_there_is_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, other = (save(make_base("llama", seed), tmp_path / name / "base") for seed, name in enumerate("ab"))
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 0.25
    (other / "config.json").write_text(json.dumps(config))
    adapter = write(tmp_path / "adapter", pair(QUERY, 16, 16), base_model_name_or_path=str(other))
    open_adapter(adapter, Checkpoint.open(other))
    assert caplog.text == ""
    open_adapter(adapter, Checkpoint.open(base))
    assert "the result is wrong. Their configs differ: rms_norm_eps = 0.25, the base has 1e-06" in caplog.text


def test_the_commit_of_a_base_is_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save(make_base("llama"), tmp_path / "base")
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    shutil.copytree(base, snapshot)
    adapter = write(tmp_path / "adapter", pair(QUERY, 16, 16), base_model_name_or_path="org/name", revision="b" * 40)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("a" * 40)
    opened = Checkpoint.open("org/name", cache_dir=tmp_path, local_files_only=True)
    open_adapter(adapter, opened)
    assert f"was trained on 'org/name at revision {'b' * 40}', and is applied to org/name at {'a' * 40}" in caplog.text

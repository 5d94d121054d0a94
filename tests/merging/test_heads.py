"""Heads that are tied in some models and not in others: equal copies are one tensor, trained ones are never lost."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import save_file

import bmm_engine as bmm
from bmm_engine.errors import CheckpointError, ConfigError, MissingTensorError
from bmm_engine.merging.accounting import loads_back
from bmm_engine.pipeline.live import share_parameters
from tests.odd import changed, mean, people, tensors

EMBEDDING = {
    "gemma2": "model.embed_tokens.weight",
    "untied llama": "model.embed_tokens.weight",
    "llama": "model.embed_tokens.weight",
    "t5": "shared.weight",
    "bart": "model.shared.weight",
    "gpt-neox": "gpt_neox.embed_in.weight",
    "tied gpt-neox": "gpt_neox.embed_in.weight",
    "gpt2": "transformer.wte.weight",
    "bert lm": "bert.embeddings.word_embeddings.weight",
}
HEAD = {
    "gpt-neox": "embed_out.weight",
    "tied gpt-neox": "embed_out.weight",
    "bert lm": "cls.predictions.decoder.weight",
}


def head_of(family):
    return HEAD.get(family, "lm_head.weight")


def with_head(path, family, own=False, **config):
    """The checkpoint with a head beside its embeddings: a copy of them, or one of its own."""

    def add(held):
        copy = held[EMBEDDING[family]].clone()
        held[head_of(family)] = copy + torch.randn_like(copy) if own else copy

    return changed(path, add, **config)


def head(path, family):
    held = tensors(path)
    return held.get(head_of(family), held[EMBEDDING[family]])


def merged(path, paths, tmp_path, **options):
    """The output's tensors, its config, and the model that transformers loads of it with nothing missing or left over."""
    result = bmm.merge(path, paths, alpha=math.inf, output=tmp_path / "out", **options)
    assert loads_back(result.path) == ""
    assert not any(result.summary()["left_out_of_experts"].values())
    config = json.loads((result.path / "config.json").read_text())
    model, report = getattr(transformers, config["architectures"][0]).from_pretrained(
        result.path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return tensors(result.path), config, model


@pytest.mark.parametrize("family", ["gemma2", "llama", "t5", "bart", "tied gpt-neox", "gpt2", "bert lm"])
@pytest.mark.parametrize("key", ["said", "left out"])
def test_equal_copies_are_one_tensor(family, key, tmp_path):
    _, _, path, paths = people(family, tmp_path)
    if key == "left out" and family not in ("llama", "tied gpt-neox"):  # whose architectures do not tie by themselves
        for p in (path, *paths):
            changed(p, tie_word_embeddings=None)
    expected, _, _ = merged(path, paths, tmp_path)
    for who in (paths[0], path):
        with_head(who, family)
        (tmp_path / "out").rename(tmp_path / f"before-{who.name}")
        found, config, model = merged(path, paths, tmp_path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert config.get("tie_word_embeddings") in (None, True)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["gemma2", "llama", "t5", "bart", "tied gpt-neox", "gpt2", "bert lm"])
@pytest.mark.parametrize("says", [True, False])
def test_a_tied_base_and_an_expert_with_a_head_of_its_own(family, says, tmp_path, caplog):
    _, _, path, paths = people(family, tmp_path)
    with_head(paths[0], family, own=True, **({} if says or family == "t5" else {"tie_word_embeddings": False}))
    if family == "bert lm":
        changed(
            paths[0], lambda held: held.update({"cls.predictions.decoder.bias": held["cls.predictions.bias"].clone()})
        )
    if family == "bart" and not says:
        sides = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
        changed(paths[0], lambda held: held.update({n: held[EMBEDDING[family]].clone() for n in sides}))
    found, config, model = merged(path, paths, tmp_path)
    expected = (head(paths[0], family).double() + head(paths[1], family).double()) / 2
    torch.testing.assert_close(model.get_output_embeddings().weight.double(), expected, rtol=0, atol=4e-7)
    own = [tensors(p) for p in paths]
    torch.testing.assert_close(found[EMBEDDING[family]].double(), mean(EMBEDDING[family], *own), rtol=0, atol=2e-7)
    torch.testing.assert_close(
        model.get_input_embeddings().weight.double(), mean(EMBEDDING[family], *own), rtol=0, atol=2e-7
    )
    assert config["tie_word_embeddings"] is (family == "t5")  # T5 reads something else from the key
    assert f"{paths[0]} has a tensor {head_of(family)!r} of its own" in caplog.text


@pytest.mark.parametrize("family", ["untied llama", "gpt-neox"])
def test_an_untied_base_and_a_tied_expert(family, tmp_path):
    _, _, path, paths = people(family, tmp_path)
    changed(paths[1], lambda held: held.pop(head_of(family)), tie_word_embeddings=True)
    found, config, _ = merged(path, paths, tmp_path)
    expected = (head(paths[0], family).double() + tensors(paths[1])[EMBEDDING[family]].double()) / 2
    torch.testing.assert_close(found[head_of(family)].double(), expected, rtol=0, atol=2e-7)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", ["untied llama", "gpt-neox"])
def test_all_untied_stay_so(family, tmp_path):
    _, _, path, paths = people(family, tmp_path)
    found, config, _ = merged(path, paths, tmp_path)
    own = [tensors(p) for p in paths]
    torch.testing.assert_close(found[head_of(family)].double(), mean(head_of(family), *own), rtol=0, atol=2e-7)
    assert config["tie_word_embeddings"] is False


def test_a_base_whose_files_hold_two_tensors_that_its_config_ties(tmp_path):
    _, _, path, paths = people("gemma2", tmp_path)
    with_head(path, "gemma2", own=True)
    found, config, model = merged(path, paths, tmp_path)
    own = [head(p, "gemma2") for p in paths]
    torch.testing.assert_close(
        found["lm_head.weight"].double(), (own[0].double() + own[1].double()) / 2, rtol=0, atol=2e-7
    )
    assert config["tie_word_embeddings"] is False
    assert torch.equal(model.lm_head.weight, found["lm_head.weight"])


def test_t5_of_version_1_1_in_all_its_forms(tmp_path):
    _, _, path, paths = people("t5", tmp_path)
    for p in (path, *paths):
        with_head(p, "t5", own=True, tie_word_embeddings=False, scale_decoder_outputs=None)
    sides = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    changed(paths[0], lambda held: held.update({n: held["shared.weight"].clone() for n in sides}))
    changed(paths[1], tie_word_embeddings=True, scale_decoder_outputs=False)  # as transformers 5 writes it
    found, config, model = merged(path, paths, tmp_path)
    own = [tensors(p) for p in paths]
    for name in ("lm_head.weight", "shared.weight"):
        torch.testing.assert_close(found[name].double(), mean(name, *own), rtol=0, atol=4e-7)
    assert config["tie_word_embeddings"] is False
    assert model.config.scale_decoder_outputs is False
    changed(paths[1], tie_word_embeddings=True, scale_decoder_outputs=None)  # an original T5: its outputs are scaled
    with pytest.raises(ConfigError, match=r"scale_decoder_outputs = True, the base has False"):
        bmm.plan_merge(path, paths)


def test_a_file_that_holds_the_tensor_under_the_tied_name_only(tmp_path):
    base, experts, path, paths = people("gpt2", tmp_path)
    expected = bmm.merge(path, paths, alpha=math.inf).tensors
    for who in (paths[0], path):
        changed(who, lambda held: held.update({"lm_head.weight": held.pop("transformer.wte.weight")}))
        found = bmm.merge(path, paths, alpha=math.inf).tensors
        assert torch.equal(found["lm_head.weight"], expected["transformer.wte.weight"])
        assert torch.equal(found["transformer.wte.weight"], expected["transformer.wte.weight"])
    # State dicts name both.
    found = bmm.merge(base, [experts[0].state_dict(), tensors(paths[1])], alpha=math.inf).tensors
    assert torch.equal(found["transformer.wte.weight"], expected["transformer.wte.weight"])


def test_files_without_a_config(tmp_path):
    _, _, path, paths = people("llama", tmp_path)
    expected = bmm.merge(path, paths, alpha=math.inf).tensors
    with_head(paths[0], "llama")
    found = bmm.merge(path, [p / "model.safetensors" for p in paths], alpha=math.inf).tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with_head(paths[1], "llama", own=True)
    result = bmm.merge(path, [p / "model.safetensors" for p in paths], alpha=math.inf)
    torch.testing.assert_close(
        result.tensors["lm_head.weight"].double(),
        (head(paths[0], "llama").double() + head(paths[1], "llama").double()) / 2,
        rtol=0,
        atol=2e-7,
    )


def test_an_expert_that_should_have_a_head_and_has_none(tmp_path):
    _, _, path, paths = people("llama", tmp_path)
    changed(paths[1], tie_word_embeddings=False)
    with pytest.raises(
        MissingTensorError, match=r"expert-1 has no tensor 'lm_head\.weight', while .*tie_word_embeddings.*correct"
    ):
        bmm.plan_merge(path, paths)


def test_continual_merges_say_that_a_head_cannot_join(tmp_path):
    _, _, path, paths = people("llama", tmp_path)
    with_head(paths[1], "llama", own=True, tie_word_embeddings=False)
    more = bmm.ContinualMerge(path, state=tmp_path / "state")
    more.add(paths[0])
    with pytest.raises(ConfigError, match=r"expert-1: 'lm_head\.weight' is a tensor of its own .*another directory"):
        more.add(paths[1])
    assert more.count == 1


def test_a_head_beside_what_is_solved(tmp_path):
    _, _, path, paths = people("gemma2", tmp_path)
    with_head(paths[0], "gemma2", own=True, tie_word_embeddings=False)
    result = bmm.merge(path, paths, output=tmp_path / "out")
    assert len(result.modules) == 14
    assert "lm_head.weight" in result.plan.from_anchor
    assert loads_back(result.path) == ""


@pytest.mark.parametrize("vocabulary", ["crop", "pad"])
def test_a_head_of_its_own_in_a_larger_vocabulary(vocabulary, tmp_path):
    _, _, path, paths = people("gemma2", tmp_path)

    def grow(held):
        held[EMBEDDING["gemma2"]] = torch.cat([held[EMBEDDING["gemma2"]], torch.randn(4, 16)])
        held["lm_head.weight"] = torch.randn(64, 16)

    changed(paths[0], grow, vocab_size=64, tie_word_embeddings=False)
    found, config, _ = merged(path, paths, tmp_path, vocabulary=vocabulary)
    assert config["tie_word_embeddings"] is False
    assert config["vocab_size"] == len(found["lm_head.weight"]) == (60 if vocabulary == "crop" else 64)
    expected = (head(paths[0], "gemma2")[:60].double() + head(paths[1], "gemma2").double()) / 2
    torch.testing.assert_close(found["lm_head.weight"][:60].double(), expected, rtol=0, atol=4e-7)


@pytest.mark.parametrize("own", [True, False])
def test_configs_that_name_no_class(own, tmp_path):
    _, _, path, paths = people("gemma2", tmp_path)
    for p in (path, *paths):
        changed(p, architectures=None, tie_word_embeddings=None)
    with_head(paths[0], "gemma2", own=own)
    result = bmm.merge(path, paths, alpha=math.inf)
    assert ("lm_head.weight" in result.plan.alignment.merged) is own
    assert not any(result.summary()["left_out_of_experts"].values())
    expected = (head(paths[0], "gemma2").double() + head(paths[1], "gemma2").double()) / 2
    torch.testing.assert_close(result.tensors["lm_head.weight"].double(), expected, rtol=0, atol=4e-7)


def test_live_models_that_tie_what_the_merge_holds_apart(tmp_path):
    base, experts, path, paths = people("gemma2", tmp_path)
    with_head(paths[0], "gemma2", own=True)
    result = bmm.merge(path, paths, alpha=math.inf)
    live = share_parameters(result.plan.alignment, [("task", 1, lambda: experts[1]), ("other", None, lambda: base)])
    live.load(result.tensors)
    for model in live.models.values():
        assert torch.equal(model.lm_head.weight, result.tensors["lm_head.weight"])
        assert torch.equal(model.model.embed_tokens.weight, result.tensors["model.embed_tokens.weight"])


def test_an_adapter_that_unties_and_what_its_error_recommends(tmp_path):
    _, _, path, _ = people("gemma2", tmp_path, experts=0)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    trained = torch.randn(60, 16)
    save_file({"base_model.model.model.embed_tokens.weight": trained}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [], "modules_to_save": ["embed_tokens"]}'
    )
    changed(path, tie_word_embeddings=None)  # as older versions write it
    with pytest.raises(CheckpointError, match=r"save the base with both tensors and tie_word_embeddings: false"):
        bmm.merge(path, [adapter], alpha=math.inf)
    with_head(path, "gemma2", tie_word_embeddings=False)
    found, config, _ = merged(path, [adapter], tmp_path)
    assert torch.equal(found["model.embed_tokens.weight"], trained)
    assert torch.equal(found["lm_head.weight"], tensors(path)["lm_head.weight"])
    assert config["tie_word_embeddings"] is False

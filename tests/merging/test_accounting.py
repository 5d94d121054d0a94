"""Configs tell of the network that the weights are of: the base's of all its tensors, the experts' of the same function, the output's of itself."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import yaml
from typer.testing import CliRunner

import bmm_engine as bmm
from bmm_engine.checkpoint.config_differences import config_differences
from bmm_engine.cli import app
from bmm_engine.errors import CheckpointError, ConfigError
from bmm_engine.merging.accounting import loads_back
from tests.tiny import family, make_base, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Architecture -> a base and two experts on disk; not to be changed."""
    found = {}
    for architecture in ("bert", "llama", "vit", "gpt2"):
        _, _, base, paths = family(architecture, tmp_path_factory.mktemp(architecture))
        found[architecture] = (base, paths)
    return found


def edited(path, folder, **keys):
    """A copy of the checkpoint with other keys in its config; None takes one away."""
    shutil.copytree(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **keys}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("architecture", ["bert", "llama", "vit", "gpt2"])
def test_good_checkpoints_pass_and_what_is_written_loads(saved, architecture, tmp_path, capfd):
    import transformers

    base, paths = saved[architecture]
    transformers.utils.logging.enable_progress_bar()  # as it is outside these tests
    try:
        assert loads_back(bmm.merge(base, paths, output=tmp_path / "out").path) == ""
    finally:
        transformers.utils.logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")
    assert bmm.plan_merge(base, paths, alpha=math.inf).groups == ()


def test_checkpoints_under_live_names_pass(saved, tmp_path):
    base, _ = saved["vit"]
    live = shutil.copytree(base, tmp_path / "live")
    torch.save(make_base("vit").state_dict(), live / "pytorch_model.bin")
    (live / "model.safetensors").unlink()
    assert bmm.plan_merge(live, [live, live], alpha=math.inf).from_anchor


FAULTS = {
    "fewer layers": (
        {"num_hidden_layers": 1},
        r"no place for 16 tensors of the weights, the first is 'bert\.encoder\.layer\.1\..*would lose them",
    ),
    "more layers": ({"num_hidden_layers": 3}, r"has 16 tensors that the weights lack, the first is .*layer\.2\..*random"),
    "tiny vocabulary": ({"vocab_size": 7}, r"word_embeddings\.weight' of shape \(7, 16\), the weights have \(60, 16\)"),
    "wider": ({"intermediate_size": 48}, r"of shape \(48,\), the weights have \(40,\)"),
    "more labels": ({"id2label": {str(i): str(i) for i in range(5)}, "label2id": None}, r"'classifier\.bias' of shape \(5,\)"),
    "head without a place": ({"architectures": ["BertModel"]}, r"BertModel .* no place for 2 tensors .*'classifier\.bias'"),
    "head that is missing": ({"architectures": ["BertForMaskedLM"]}, r"BertForMaskedLM .*"),
    "abstract": ({"architectures": ["PreTrainedModel"]}, "names 'PreTrainedModel', which is no model that can be built"),
    "abstract of the family": ({"architectures": ["BertPreTrainedModel"]}, "'BertPreTrainedModel', which is no model"),
    "no model": ({"architectures": ["BertConfig"]}, "'BertConfig', which is no model that can be built"),
    "a function": ({"architectures": ["pipeline"]}, "'pipeline', which is no model that can be built"),
    "of another family": ({"architectures": ["GPT2LMHeadModel"]}, "transformers builds no GPT2LMHeadModel of it"),
    "no division": ({"num_attention_heads": 5}, "transformers builds no BertForSequenceClassification of it"),
    "activation unknown": ({"hidden_act": "jelly"}, "transformers builds no BertForSequenceClassification of it"),
    "text for a number": ({"hidden_size": "wide"}, r"transformers .* no (bert|BertForSequenceClassification) of it"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("options", [{}, {"alpha": math.inf}, {"modules": ["*query"]}])
def test_a_base_whose_config_tells_of_other_tensors(saved, fault, options, tmp_path):
    base, _ = saved["bert"]
    change, words = FAULTS[fault]
    spoilt = edited(base, tmp_path / "base", **change)
    with pytest.raises(CheckpointError, match=rf"(?s)base.config\.json: .*{words}|base: .*{words}"):
        bmm.plan_merge(spoilt, [spoilt, spoilt], **options)


def test_what_is_left_over_can_be_asked_for(saved, tmp_path):
    base, paths = saved["bert"]
    spoilt = edited(base, tmp_path / "base", architectures=["BertModel"])
    for options in ({"keep_base": ["classifier.*"]}, {"unchecked_configs": True}):
        assert bmm.plan_merge(spoilt, paths, **options).module_count == 13
    unknown = edited(base, tmp_path / "own", architectures=["OwnModel"])
    assert bmm.plan_merge(unknown, paths).module_count == 13


LLAMA = {
    "num_attention_heads": ({"num_attention_heads": 2, "head_dim": 4}, r"num_attention_heads = 2, the base has 4"),
    "num_key_value_heads": ({"num_key_value_heads": 4}, "num_key_value_heads = 4, the base has 2"),
    "eps": ({"rms_norm_eps": 0.1}, r"rms_norm_eps = 0\.1, the base has 1e-06"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu', the base has 'silu'"),
    "rope theta": ({"rope_theta": 5e5, "rope_parameters": None}, r"rope_parameters\.rope_theta = 500000\.0, the base has 10000"),
    "rope scaling": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        r"rope_parameters\.",
    ),
    "model type": ({"model_type": "mistral"}, "model_type = 'mistral', the base has 'llama'"),
    "layers": ({"num_hidden_layers": 1}, "num_hidden_layers = 1, the base has 2"),
}  # fmt: skip


@pytest.mark.parametrize("key", LLAMA)
def test_an_expert_of_another_function_is_refused_with_both_values(saved, key, tmp_path):
    base, paths = saved["llama"]
    change, words = LLAMA[key]
    other = edited(paths[1], tmp_path / "other", **change)
    with pytest.raises(ConfigError, match=rf"other: its config\.json .*{words}.*unchecked_configs: true"):
        bmm.plan_merge(base, [paths[0], other])
    with pytest.raises(ConfigError, match=words):
        bmm.plan_merge(base, [paths[0], other], alpha=math.inf)
    assert bmm.plan_merge(base, [paths[0], other], unchecked_configs=True).module_count == 14


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("bert", {"layer_norm_eps": 1e-5}),
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"is_decoder": True}),
        ("vit", {"layer_norm_eps": 1e-5}),
        ("vit", {"num_attention_heads": 2}),
        ("gpt2", {"n_head": 2}),
        ("gpt2", {"vocab_size": 7}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"scale_attn_weights": False}),
    ],
)
def test_the_same_of_other_families(saved, architecture, change, tmp_path):
    base, paths = saved[architecture]
    (key,) = change
    with pytest.raises(ConfigError, match=rf"other: .*{key} = "):
        bmm.plan_merge(base, [paths[0], edited(paths[1], tmp_path / "other", **change)])


def test_a_rope_that_leaves_out_its_theta_has_the_default(saved, tmp_path):
    base, paths = saved["llama"]
    short = edited(paths[1], tmp_path / "short", rope_parameters={"rope_type": "default"})
    assert bmm.plan_merge(base, [paths[0], short]).module_count == 14
    far = edited(base, tmp_path / "far", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    first = edited(paths[0], tmp_path / "first", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(ConfigError, match=r"short: .*rope_parameters\.rope_theta = 10000\.0, the base has 500000\.0"):
        bmm.plan_merge(far, [first, short])


def test_what_does_not_matter_is_a_line_in_the_log(saved, tmp_path, caplog):
    base, paths = saved["llama"]
    config = json.loads((base / "config.json").read_text())
    other = edited(
        paths[1],
        tmp_path / "other",
        _name_or_path="elsewhere",
        transformers_version="4.40.0",
        use_cache=False,
        dtype="bfloat16",
        attention_dropout=0.5,
        id2label={"0": "bad", "1": "good"},
        label2id={"bad": 0, "good": 1},
        max_position_embeddings=4096,
        unsloth_version="2024.9",
        architectures=["LlamaForSequenceClassification"],
        initializer_range=0.1,
        rms_norm_eps=None if config["rms_norm_eps"] == 1e-6 else config["rms_norm_eps"],  # the default, left out
    )
    with caplog.at_level("INFO", logger="bmm_engine"):
        assert bmm.plan_merge(base, [paths[0], other]).module_count == 14
    assert "differs from the base's in what does not matter" in caplog.text


def test_configs_of_an_architecture_that_nobody_knows():
    base = {"model_type": "own", "num_heads": 4, "norm_eps": 1e-5, "colour": "red", "act": "silu"}
    found = config_differences(base, {**base, "norm_eps": 1e-6, "colour": "blue", "dropout": 0.1})
    assert [(one.key, one.matters) for one in found] == [("norm_eps", True), ("colour", False)]
    assert config_differences(base, dict(base)) == []
    assert config_differences(None, base) == []


@pytest.mark.parametrize(
    "change",
    [{"layer_norm_eps": [1]}, {"vocab_size": "/etc/passwd"}, {"hidden_act": math.nan}, {"model_type": ["bert"]}],
)
def test_values_that_no_config_takes(change):
    base = {"model_type": "bert", "hidden_size": 16}
    found = config_differences(base, {**base, **change})
    assert [one.key for one in found if one.matters] == list(change)


def test_the_command_says_what_loads(saved, tmp_path):
    base, paths = saved["bert"]
    for name, change, words in (
        ("good", {}, "Load it with AutoModel"),
        ("cut", {"num_hidden_layers": 1}, "It does not load as it was written: BertForSequenceClassification"),
        ("own", {"model_type": "own"}, "Whether it loads was not checked"),
    ):
        own = [edited(path, tmp_path / f"{name}-{i}", **change) for i, path in enumerate((base, *paths))]
        recipe = tmp_path / f"{name}.yaml"
        keys = {"base": str(own[0]), "experts": [{"model": str(p)} for p in own[1:]], "modules": ["*query"]}
        recipe.write_text(yaml.safe_dump(keys))
        arguments = ["merge", str(recipe), "-o", str(tmp_path / f"{name}-out"), "--unchecked-configs"]
        found = CliRunner().invoke(app, arguments)
        assert found.exit_code == 0, found.exception
        assert words in " ".join(found.output.split())
        assert ("Load it with" in found.output) == (name != "cut")


def test_an_encoder_that_was_saved_without_its_pooler(tmp_path):
    from transformers import BertModel

    torch.manual_seed(0)
    bare = save(BertModel(make_base("bert").config, add_pooling_layer=False), tmp_path / "bare")
    result = bmm.merge(bare, [bare, bare], output=tmp_path / "out")
    assert len(result.modules) == 12
    assert loads_back(result.path) == ""


def test_a_head_that_the_file_lacks(tmp_path):
    bare = save(make_base("bert").bert, tmp_path / "bare")
    assert bmm.plan_merge(bare, [bare, bare]).module_count == 13
    spoilt = edited(bare, tmp_path / "base", architectures=["BertForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"has 2 tensors that the weights lack, the first is 'classifier"):
        bmm.plan_merge(spoilt, [bare, bare])

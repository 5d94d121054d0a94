"""Stacked models: which tensor comes from where, what the config says, and that transformers loads the result."""

from __future__ import annotations

import pytest
import torch
import transformers

from bmm_engine.checkpoint import Checkpoint, CheckpointWriter, StateDictSource
from bmm_engine.checkpoint.compose import LayerRange, LayerStack, StackedSource, checkpoints_of, stands_before
from bmm_engine.errors import ConfigError, MissingTensorError
from tests.tiny import family, make_base, save


@pytest.fixture
def models(tmp_path):
    """Two tiny Llamas of two layers, tied embeddings."""
    _, _, base, (other, _) = family("llama", tmp_path)
    return Checkpoint.open(base), Checkpoint.open(other)


def state(layers, *, prefix="model.layers.", extra=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = [*extra, *(f"{prefix}{i}.mlp.weight" for i in range(layers))]
    return {name: torch.randn(3, 2, generator=generator) for name in names}


def test_every_tensor_comes_from_its_place(models):
    first, second = models
    stacked = StackedSource([LayerRange(first, 0, 2), LayerRange(second, 1, 2), LayerRange(first, 0, 1)])
    own = ".self_attn.q_proj.weight"
    expected = {
        "model.embed_tokens.weight": (first, "model.embed_tokens.weight"),
        "model.norm.weight": (first, "model.norm.weight"),
        f"model.layers.1{own}": (first, f"model.layers.1{own}"),
        f"model.layers.2{own}": (second, f"model.layers.1{own}"),
        f"model.layers.3{own}": (first, f"model.layers.0{own}"),
    }
    for name, (source, original) in expected.items():
        assert torch.equal(stacked.load(name), source.load(original))
        assert stacked.spec(name).name == name
    assert torch.equal(stacked.load(f"model.layers.2{own}", slice(3, 9)), second.load(f"model.layers.1{own}")[3:9])
    per_layer = sum(n.startswith("model.layers.0.") for n in first.names())
    assert len(stacked.names()) == 4 * per_layer + 2
    assert stacked.config["num_hidden_layers"] == 4
    assert first.config["num_hidden_layers"] == 2
    assert stacked.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert stacked.inputs == (first, second)


def test_the_ends_come_from_the_first_and_the_last_model(models):
    first, second = models
    stacked = StackedSource([LayerRange(first, 0, 1), LayerRange(second, 1, 2)])
    assert torch.equal(stacked.load("model.embed_tokens.weight"), first.load("model.embed_tokens.weight"))
    assert torch.equal(stacked.load("model.norm.weight"), second.load("model.norm.weight"))
    assert torch.equal(
        stacked.load("lm_head.weight"), first.load("model.embed_tokens.weight")
    )  # tied, as the config says


def test_all_layers_of_one_model_are_the_model(models):
    source = models[0]
    stacked = StackedSource([LayerRange(source, 0, 1), LayerRange(source, 1, 2)])
    assert set(stacked.names()) == set(source.names())
    assert all(torch.equal(stacked.load(n), source.load(n)) for n in source.names())
    assert stacked.config == source.config


def test_a_stack_of_stacks(models):
    first, second = models
    inner = StackedSource([LayerRange(first, 0, 2), LayerRange(second, 0, 2)])
    outer = StackedSource([LayerRange(inner, 3, 4), LayerRange(inner, 0, 1)])
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(outer.load(name), second.load("model.layers.1.mlp.up_proj.weight"))
    assert outer.config["num_hidden_layers"] == 2
    assert list(checkpoints_of(outer)) == [first, second]


@pytest.mark.parametrize("tied_first", [True, False])
def test_a_tied_and_an_untied_model(tmp_path, tied_first):
    """The head is the last model's where the first is untied; an untied head unties the result."""
    tied = make_base("llama", 1)
    config = transformers.LlamaConfig(**{**tied.config.to_dict(), "tie_word_embeddings": False})
    torch.manual_seed(5)
    untied = transformers.LlamaForCausalLM(config)
    paths = save(tied, tmp_path / "tied"), save(untied, tmp_path / "untied")
    first, last = (Checkpoint.open(p) for p in (paths if tied_first else paths[::-1]))
    stacked = StackedSource([LayerRange(first, 0, 1), LayerRange(last, 0, 1)])
    assert stacked.aliases == {}
    assert torch.equal(stacked.load("lm_head.weight"), last.load("lm_head.weight"))
    assert stacked.config["tie_word_embeddings"] is False


def test_transformers_loads_it(models, tmp_path):
    first, second = models
    stacked = StackedSource([LayerRange(first, 0, 2), LayerRange(second, 0, 2)])
    with CheckpointWriter(tmp_path / "out", [stacked.spec(n) for n in stacked.names()]) as writer:
        for name in stacked.names():
            writer.write(name, stacked.load(name))
        writer.write_json("config.json", stacked.config)
        writer.commit()
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert len(model.model.layers) == 4
    expected = second.load("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight, expected)


def test_lists_with_an_entry_for_each_layer():
    config = {"text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "sizes": [1, 2, 3]}}
    source = StateDictSource(state(3), config=config)
    other = StateDictSource(state(3), config={"text_config": {**config["text_config"], "layer_types": ["x", "y", "z"]}})
    stacked = StackedSource([LayerRange(source, 1, 3), LayerRange(other, 0, 2)])
    text = stacked.config["text_config"]
    assert text == {"num_hidden_layers": 4, "layer_types": ["b", "c", "x", "y"], "sizes": [1, 2, 3]}


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("model.embed_tokens.weight", True),
        ("bert.embeddings.LayerNorm.weight", True),
        ("transformer.wpe.weight", True),
        ("transformer.word_embeddings_layernorm.bias", True),
        ("vit.embeddings.cls_token", True),
        ("vision_model.pre_layrnorm.weight", True),
        ("model.norm.weight", False),
        ("transformer.ln_f.bias", False),
        ("lm_head.weight", False),
        ("embed_out.weight", False),
        ("bert.pooler.dense.weight", False),
        ("classifier.bias", False),
    ],
)
def test_what_stands_before_the_layers(name, before):
    assert stands_before(name) is before


def test_the_stack_that_the_config_counts():
    tensors = state(2, prefix="vision.blocks.") | state(4, prefix="text.layers.")
    stack = LayerStack(StateDictSource(tensors, config={"num_hidden_layers": 4}))
    assert (stack.prefix, stack.count) == ("text.layers.", 4)
    assert stack.split("text.layers.3.experts.7.weight") == (3, ".experts.7.weight")
    assert stack.split("vision.blocks.0.mlp.weight") is None
    with pytest.raises(ConfigError, match=r"vision\.blocks\.0\.\.1, text\.layers\.0\.\.3"):
        LayerStack(StateDictSource(tensors))


@pytest.mark.parametrize("span", [(0, 3), (-1, 1), (1, 0), (2, 3)])
def test_a_range_outside_the_model(models, span):
    with pytest.raises(ConfigError, match=rf"base: layers \[{span[0]}, {span[1]}\].*its 2 layers"):
        StackedSource([LayerRange(models[0], *span)])


def test_models_that_name_their_layers_differently():
    one, two = StateDictSource(state(2), "one"), StateDictSource(state(2, prefix="h."), "two")
    with pytest.raises(ConfigError, match=r"two calls its layers h\.N, one model\.layers\.N"):
        StackedSource([LayerRange(one, 0, 1), LayerRange(two, 0, 1)])
    with pytest.raises(ConfigError, match="at least one slice"):
        StackedSource([])
    with pytest.raises(ConfigError, match="this model has none"):
        StackedSource([LayerRange(StateDictSource({"w": torch.ones(2)}, "flat"), 0, 1)])


def test_an_unknown_name(models):
    with pytest.raises(MissingTensorError, match=r"model\.layers\.1\.mlp"):
        StackedSource([LayerRange(models[0], 0, 2)]).load("model.layers.7.mlp.up_proj.weight")

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from bmm_engine.anchors import get_anchor
from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from tests.tiny import family, save

GOOD = {"base": "b", "experts": ["x", "y"]}


def load(tmp_path, recipe, **overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return Recipe.load(path, **overrides)


def test_defaults_and_short_forms(tmp_path):
    recipe = load(tmp_path, {**GOOD, "anchor": "ties", "modules": "*q*"})
    assert [e.model for e in recipe.experts] == ["x", "y"]
    assert recipe.anchor.name == "ties"
    assert recipe.gram_source == "task_vectors"
    assert recipe.modules == ["*q*"]


def test_long_forms_and_inferred_source(tmp_path):
    experts = [{"model": "x", "grams": "x.safetensors"}, {"model": "y", "calibration": "y.txt", "name": "why"}]
    recipe = load(
        tmp_path, {**GOOD, "experts": experts, "anchor": {"name": "ties", "density": 0.3}, "alpha": float("inf")}
    )
    assert recipe.gram_source == "data"
    assert recipe.anchor.parameters == {"density": 0.3}
    assert recipe.alpha == math.inf
    assert recipe.expert_name(1) == "why"


@pytest.mark.parametrize(
    ("own", "more", "source"),
    [
        ({"grams": "g"}, {}, "hybrid"),
        ({"calibration": "c.txt"}, {"mode": "plain"}, "hybrid"),
        ({"calibration": "c.txt"}, {}, "data"),  # sequential
        ({"grams": "g"}, {"fit_bias": True}, "data"),
        ({"grams": "g"}, {"alpha": float("inf")}, "data"),
        ({"grams": "g"}, {"gram_source": "data"}, "data"),
        ({}, {}, "task_vectors"),
    ],
)
def test_the_gram_source_that_is_chosen(tmp_path, own, more, source):
    recipe = load(tmp_path, {**GOOD, "experts": [{"model": "x", **own}, {"model": "y", **own}], **more})
    assert recipe.gram_source == source


def test_paths_are_relative_to_the_recipe_and_hub_ids_stay(tmp_path):
    (tmp_path / "x").mkdir()
    recipe = load(tmp_path, {"base": "org/name", "experts": [{"model": "x", "grams": "new/g.safetensors"}]})
    assert recipe.base == "org/name"
    assert recipe.experts[0].model == str(tmp_path / "x")
    assert recipe.experts[0].grams == str(tmp_path / "new/g.safetensors")


def test_overrides(tmp_path):
    recipe = load(tmp_path, {**GOOD, "alpha": 1.0}, alpha=0.5, anchor="iso_c", dtype=None)
    assert (recipe.alpha, recipe.anchor.name, recipe.dtype) == (0.5, "iso_c", None)


def test_plain_values_load_again(tmp_path):
    recipe = load(tmp_path, {**GOOD, "alpha": float("inf"), "anchor": {"name": "ties", "density": 0.5}})
    again = Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.plain())))
    assert again == recipe


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({**GOOD, "aplha": 1}, r"unknown key 'aplha'; did you mean 'alpha'"),
        ({**GOOD, "experts": [{"model": "x", "gram": "g"}]}, r"'experts\.0\.gram'; did you mean 'grams'"),
        ({**GOOD, "calibration": {"sample": 3}}, r"'calibration\.sample'; did you mean 'samples'"),
        ({**GOOD, "zzz": 1}, "known keys are base, experts"),
        ({"base": "b"}, "'experts' is missing"),
        ({**GOOD, "experts": []}, "experts"),
        ({**GOOD, "alpha": -1}, "alpha = -1"),
        ({**GOOD, "alpha": "large"}, "alpha = 'large'"),
        ({**GOOD, "gram_source": "dta"}, "gram_source = 'dta'"),
        ({**GOOD, "gram_source": "data"}, "'x' has none"),
        ({**GOOD, "experts": ["x", {"model": "y", "grams": "g"}]}, "'x' has neither"),
        ({**GOOD, "task_weights": "energetic"}, "task_weights"),
        ({**GOOD, "alpha": [{"filter": "mlp", "value": -1}]}, r"alpha.*it must be >= 0"),
        ({**GOOD, "alpha": {"gradients": [1]}}, r"alpha.*gradient: \[first"),
        ({**GOOD, "scale": [1, float("inf")]}, r"scale.*it must be finite"),
        ({**GOOD, "anchor": "tis"}, r"no anchor 'tis'; did you mean 'ties'"),
        ({**GOOD, "anchor": {"name": "ties", "densty": 1}}, "no parameter 'densty'; did you mean 'density'"),
        ({**GOOD, "anchor": {"name": "ties", "density": 2}}, "'ties': density = 2"),
        ({**GOOD, "anchor": {"name": "ties", "density": [0.1, 0.2, 0.3]}}, "3 values for 2 experts"),
        ({**GOOD, "anchor": "slerp"}, "exactly 1 experts beside the base, not 2"),
        ({**GOOD, "anchor": "fisher"}, "'x' has no `fisher`"),
        ({**GOOD, "base": {"model": "b", "revisions": "1"}}, r"'base\.revisions'; did you mean 'revision'"),
        (
            {**GOOD, "base": {"slices": [{"model": "b", "layer": [0, 1]}]}},
            r"'base\.slices\.0\.layer'; did you mean 'layers'",
        ),
        ({**GOOD, "base": {"slices": [{"model": "b"}]}}, r"'base\.slices\.0\.layers' is missing"),
        ({**GOOD, "base": 3}, "base = 3"),
        ({**GOOD, "vocabulary": "trim"}, "vocabulary = 'trim'"),
        ({**GOOD, "search": {"trials": True}}, r"search\.trials = True: it must not be true or false"),
        ({**GOOD, "fit_bias": 0}, "fit_bias = 0: it must be true or false"),
        (
            {**GOOD, "experts": [{"model": "x", "name": "a"}, {"model": "y", "name": "a"}]},
            "two experts are called 'a'; give each a .name. of its own",
        ),
        ({**GOOD, "same_tokenizer": "1"}, "same_tokenizer = '1': it must be true or false"),
        ({**GOOD, "fit_bias": "yes"}, "fit_bias = 'yes': it must be true or false"),
        ({**GOOD, "search": {"racing": "off"}}, r"search\.racing = 'off': it must be true or false"),
        ({**GOOD, "hybrid_share": False}, "hybrid_share = False: it must not be true or false"),
        ("- a\n- b\n", "holds a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_name_the_file_the_key_and_the_remedy(tmp_path, recipe, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load(tmp_path, recipe)
    assert "recipe.yaml" in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: the recipe cannot be read"):
        Recipe.load(tmp_path / "none.yaml")


def with_parameters(*parameters, **anchor):
    experts = [{"model": f"m{i}", "parameters": p} for i, p in enumerate(parameters)]
    return Recipe.parse({"base": "b", "experts": experts, "anchor": {"name": "ties", **anchor}})


@pytest.mark.parametrize(
    ("anchor", "own", "expected"),
    [
        ({}, [{"density": 0.1}, {}], [0.1, 0.2]),  # the rule's default
        ({"density": 0.4}, [{"density": 0.1}, {}], [0.1, 0.4]),
        ({"density": [0.4, 0.5]}, [{"density": 0.1}, {}], [0.1, 0.5]),
        ({}, [{"density": [0.1, 0.9]}, {"density": 0.3}], [{"gradient": [0.1, 0.9]}, 0.3]),
        ({"density": {"gradient": [0.0, 1.0]}}, [{}, {"density": 0.3}], [{"gradient": [0.0, 1.0]}, 0.3]),
    ],
)
def test_parameters_of_the_experts_join_the_anchors(anchor, own, expected):
    assert with_parameters(*own, **anchor).anchor_parameters == {"density": expected}


def resolved(recipe, name, depth=0.0):
    rule = get_anchor(recipe.anchor.name)
    return rule.parameters(recipe.anchor_parameters).at(name, depth, len(recipe.experts))


def test_filters_of_an_expert_fall_back_to_the_anchors_value():
    recipe = with_parameters(
        {"weight": [{"filter": "mlp", "value": [0.0, 1.0]}]},
        {"weights": 2.0},
        weight=[{"filter": "norm", "value": [5.0, 6.0]}, {"value": [3.0, 4.0]}],
    )
    assert resolved(recipe, "layers.0.mlp", 0.25)["weight"] == (0.25, 2.0)
    assert resolved(recipe, "layers.0.norm", 0.25)["weight"] == (5.0, 2.0)
    assert resolved(recipe, "layers.0.attn", 0.25)["weight"] == (3.0, 2.0)


def test_what_an_expert_may_not_set():
    with pytest.raises(ConfigError, match=r"'m1': parameters\.scaling: anchor 'ties' has one scaling for all"):
        with_parameters({}, {"scaling": 2})
    with pytest.raises(ConfigError, match="no parameter 'wieght'; did you mean 'weight'"):
        with_parameters({"wieght": 2}, {})
    with pytest.raises(ConfigError, match="1 values for 2 experts"):
        with_parameters({"density": 0.1}, {}, density=[0.3])


def test_alpha_and_scale_may_vary_over_the_model(tmp_path):
    text = """
base: b
experts: [x, {model: y}]
alpha: [{filter: mlp, value: .inf}, {filter: attn, value: {gradient: [0.01, 1e-1]}}, {value: 0.5}]
scale: {gradient: [0, 1]}
"""
    recipe = load(tmp_path, text)
    assert recipe.alpha[0] == {"filter": "mlp", "value": math.inf}
    assert recipe.alpha[1]["value"] == {"gradient": [0.01, 0.1]}
    assert recipe.scale == {"gradient": [0.0, 1.0]}
    assert recipe.plain()["alpha"][0]["value"] == "inf"
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.plain()))) == recipe


def test_models_named_by_more_than_a_path(tmp_path):
    for name in ("a", "b", "lora"):
        (tmp_path / name).mkdir()
    text = """
base: {model: a, adapter: lora}
experts:
  - slices: [{model: a, layers: [0, 2]}, {model: org/hub, revision: main, layers: [1, 3]}]
  - model: {slices: [{model: b, layers: [0, 4]}]}
    fisher: f.safetensors
  - {model: b, fisher: g.safetensors}
"""
    with pytest.raises(
        ConfigError, match=r"expert 'a\[0:2\] \+ hub\[1:3\]' has no `fisher`, which anchor 'fisher' needs"
    ):
        load(tmp_path, text + "anchor: fisher\n")
    recipe = load(
        tmp_path,
        text.replace("  - slices: [", "  - fisher: e.safetensors\n    model: {slices: [").replace(
            "3]}]\n", "3]}]}\n", 1
        ),
    )
    assert recipe.base.model == str(tmp_path / "a")
    assert recipe.base.adapter == str(tmp_path / "lora")
    first = recipe.experts[0].model.slices
    assert [(s.model, s.revision, s.layers) for s in first] == [
        (str(tmp_path / "a"), None, (0, 2)),
        ("org/hub", "main", (1, 3)),
    ]
    assert recipe.experts[1].fisher == str(tmp_path / "f.safetensors")
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.plain()))) == recipe


def test_calibration_needs_a_checkpoint():
    expert = {"model": {"slices": [{"model": "a", "layers": [0, 2]}]}, "calibration": "x.txt"}
    with pytest.raises(ConfigError, match="`calibration` runs the model"):
        Recipe.parse({"base": "b", "experts": [expert]})


def run(tmp_path, recipe, name="out"):
    result = run_recipe(load(tmp_path, recipe), tmp_path / name, progress=False)
    return load_file(result.path / "model.safetensors"), result


def test_layers_of_a_stack_are_merged_as_those_of_the_whole_models(tmp_path):
    family("llama", tmp_path)
    plain, _ = run(tmp_path, {"base": "base", "experts": ["expert-0", "expert-1"]}, "plain")

    def stack(model):
        return {"slices": [{"model": model, "layers": [0, 2]}, {"model": model, "layers": [1, 2]}]}

    recipe = {"base": stack("base"), "experts": [stack("expert-0"), stack("expert-1")]}
    stacked, result = run(tmp_path, recipe, "stacked")
    assert len(result.modules) == 21
    for name, tensor in stacked.items():
        assert torch.equal(tensor, plain[name.replace("layers.2.", "layers.1.")]), name
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stacked")
    assert len(model.model.layers) == 3
    record = json.loads((tmp_path / "stacked" / "bmm_merge.json").read_text())
    assert {entry["source"] for entry in record["inputs"]} == {
        str(tmp_path / n) for n in ("base", "expert-0", "expert-1")
    }
    assert all("model.safetensors" in entry["files"] for entry in record["inputs"])


@pytest.mark.parametrize(("mode", "rows"), [("crop", 60), ("pad", 64)])
def test_unequal_vocabularies_from_the_recipe_to_a_model(tmp_path, mode, rows):
    _, (_, large), _, _ = family("llama", tmp_path)
    large.resize_token_embeddings(64, mean_resizing=False)
    save(large, tmp_path / "expert-1")
    recipe = {"base": "base", "experts": ["expert-0", "expert-1"]}
    with pytest.raises(ShapeMismatchError, match="vocabulary: crop"):
        run(tmp_path, recipe)
    merged, result = run(tmp_path, {**recipe, "vocabulary": mode})
    assert len(result.modules) == 14
    embedding = merged["model.embed_tokens.weight"]
    assert embedding.shape == (rows, 16)
    experts = [load_file(tmp_path / f"expert-{i}" / "model.safetensors")["model.embed_tokens.weight"] for i in range(2)]
    torch.testing.assert_close(embedding[:60], (experts[0] + experts[1][:60]) / 2)
    assert torch.equal(embedding[60:], experts[1][60:rows])  # the only one that has these rows
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == rows

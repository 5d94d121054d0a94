"""mergekit configurations as people write them, run on tiny Llamas: against formulas in float64, and against mergekit itself."""

from __future__ import annotations

import json
import math
import shutil
import warnings

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from bmm_engine.anchors import get_anchor
from bmm_engine.cli import main
from bmm_engine.errors import ConfigError
from bmm_engine.pipeline.run import plan_recipe, run_recipe
from bmm_engine.recipe.mergekit.methods import METHODS
from bmm_engine.recipe.recipe import Recipe
from tests.tiny import fine_tune, save

LAYERS = 3
SLERP = """
slices:
  - sources:
      - {model: base, layer_range: [0, 3]}
      - {model: a, layer_range: [0, 3]}
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
"""
TIES = """
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0.25
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
"""
LINEAR = """
models:
  - model: a
    parameters: {weight: 1.0}
  - model: b
    parameters: {weight: 0.3}
merge_method: linear
"""
TASK_ARITHMETIC = """
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - model: base+lora
    parameters: {weight: 0.75}
  - model: {model: {path: a}, lora: {path: lora}}
    parameters: {weight: -0.5}
parameters:
  lambda: 1.5
"""
FRANKENMERGE = """
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
  - sources:
      - {model: b, layer_range: [1, 3]}
  - sources:
      - model: a
        layer_range: [1, 3]
        parameters:
          scale:
            - filter: o_proj
              value: 0.5
            - filter: down_proj
              value: [0.5, 0.25]
            - value: 1.0
merge_method: passthrough
dtype: float32
"""
STACKED_LINEAR = """
slices:
  - sources:
      - {model: a, layer_range: [1, 3], parameters: {weight: 2.0}}
      - {model: b, layer_range: [0, 2]}
    parameters: {weight: 0.5}
  - sources:
      - {model: c, layer_range: [0, 2], parameters: {weight: [0.1, 0.9]}}
      - {model: a, layer_range: [1, 3]}
merge_method: linear
parameters:
  weight:
    - {filter: norm, value: 4.0}
    - {value: [0.3, 0.6]}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Untied Llamas of three layers: `base`, its fine-tunes `a`, `b`, `c`, and `lora`, an adapter of two modules."""
    folder = tmp_path_factory.mktemp("mergekit")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    torch.manual_seed(7)
    base = transformers.LlamaForCausalLM(config)
    save(base, folder / "base")
    for seed, name in enumerate("abc"):
        save(fine_tune(base, seed), folder / name)
    (folder / "lora").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "base"}))
    factors = {}
    for module, out, inner in (("self_attn.q_proj", 16, 16), ("mlp.down_proj", 16, 24)):
        for layer in range(LAYERS):
            key = f"base_model.model.model.layers.{layer}.{module}"
            factors[f"{key}.lora_A.weight"] = torch.randn(2, inner) / 5
            factors[f"{key}.lora_B.weight"] = torch.randn(out, 2) / 5
    save_file(factors, folder / "lora" / "adapter_model.safetensors")
    return folder


def tensors(project, name):
    """A model in float64; `name+lora` with the adapter in it."""
    model, _, lora = name.partition("+")
    state = {n: t.double() for n, t in load_file(project / model / "model.safetensors").items()}
    if lora:
        factors = {n: t.double() for n, t in load_file(project / lora / "adapter_model.safetensors").items()}
        for key in [n for n in factors if ".lora_A." in n]:
            weight = key.removeprefix("base_model.model.").replace(".lora_A", "")
            state[weight] = state[weight] + 3 * factors[key.replace("lora_A", "lora_B")] @ factors[key]
    return state


def run(project, tmp_path, text):
    path = project / "config.yaml"
    path.write_text(text)
    result = run_recipe(Recipe.load(path), tmp_path / "out", progress=False)
    return load_file(result.path / "model.safetensors")


def assert_close(merged, expected, tolerance=1e-6):
    assert set(merged) == set(expected)
    for name, truth in expected.items():
        error = float((merged[name].double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def layer_of(name):
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def at(values, t):
    """mergekit's gradient: linear interpolation between equally spaced values."""
    place = t * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])


def depth(name):
    return 0.0 if layer_of(name) is None else layer_of(name) / (LAYERS - 1)


def test_slerp_with_filters_and_gradients(project, tmp_path):
    base, a = tensors(project, "base"), tensors(project, "a")
    expected = {}
    for name in base:
        attention, mlp = (at(values, depth(name)) for values in ([0, 0.5, 0.3, 0.7, 1], [1, 0.5, 0.7, 0.3, 0]))
        t = attention if "self_attn" in name else mlp if "mlp" in name else 0.5
        cosine = (base[name] * a[name]).sum() / (base[name].norm() * a[name].norm())
        if abs(cosine) > 0.9995:
            expected[name] = (1 - t) * base[name] + t * a[name]
        else:
            angle = cosine.acos()
            expected[name] = (((1 - t) * angle).sin() * base[name] + (t * angle).sin() * a[name]) / angle.sin()
    assert_close(run(project, tmp_path, SLERP), expected)


def test_ties_with_gradients_of_density_and_weight(project, tmp_path):
    base = tensors(project, "base")
    experts = [tensors(project, name) for name in "abc"]
    expected = {}
    for name, origin in base.items():
        t = depth(name)
        density = [at([1, 0.7, 0.1], t), 0.5, 0.33]
        weight = [1.0, at([0, 0.3, 0.7, 1], t), 0.5 if "mlp" in name else 0.25]
        pruned = []
        for expert, share, w in zip(experts, density, weight):
            tau = (expert[name].float() - origin.float()).double().flatten()
            keep = torch.zeros_like(tau)
            count = tau.numel() if share >= 1 else max(1, int(share * tau.numel()))
            keep[tau.abs().argsort(descending=True, stable=True)[:count]] = 1
            pruned.append(w * keep * tau)
        total = sum(pruned)
        sign = torch.where(total >= 0, 1.0, -1.0)
        agree = [p.sign() == sign for p in pruned]
        divisor = sum(w * m for w, m in zip(weight, agree))
        divisor = torch.where(divisor == 0, 1.0, divisor)
        expected[name] = origin + (sum(p * m for p, m in zip(pruned, agree)) / divisor).view_as(origin)
    assert_close(run(project, tmp_path, TIES), expected)


def test_linear(project, tmp_path):
    a, b = tensors(project, "a"), tensors(project, "b")
    assert_close(run(project, tmp_path, LINEAR), {n: (a[n] + 0.3 * b[n]) / 1.3 for n in a})
    plain = run(project, tmp_path / "plain", LINEAR + "parameters: {normalize: false}\n")
    assert_close(plain, {n: a[n] + 0.3 * b[n] for n in a})


def test_task_arithmetic_with_adapters(project, tmp_path):
    base, one, two = (tensors(project, n) for n in ("base", "base+lora", "a+lora"))
    merged = run(project, tmp_path, TASK_ARITHMETIC)
    assert_close(merged, {n: w + 1.5 * (0.75 * (one[n] - w) - 0.5 * (two[n] - w)) for n, w in base.items()})


def place(state, layer, out, factor=lambda rest: 1.0):
    """The tensors of one layer under another number."""
    own = f"model.layers.{layer}."
    return {
        f"model.layers.{out}.{n[len(own) :]}": factor(n[len(own) :]) * w for n, w in state.items() if n.startswith(own)
    }


def test_a_frankenmerge_loads_with_its_new_depth(project, tmp_path):
    a, b = tensors(project, "a"), tensors(project, "b")

    def scale(down):
        return lambda rest: 0.5 if "o_proj" in rest else down if "down_proj" in rest else 1.0

    expected = {"model.embed_tokens.weight": a["model.embed_tokens.weight"]}
    expected |= place(a, 0, 0) | place(a, 1, 1) | place(b, 1, 2) | place(b, 2, 3)
    expected |= place(a, 1, 4, scale(0.5)) | place(a, 2, 5, scale(0.25))
    expected |= {n: a[n] for n in ("model.norm.weight", "lm_head.weight")}
    merged = run(project, tmp_path, FRANKENMERGE)
    assert_close(merged, expected, tolerance=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(model.model.layers) == 6
    record = json.loads((tmp_path / "out" / "bmm_merge.json").read_text())
    again = Recipe.parse(record["recipe"])
    assert again.experts[0].model.slices[1].layers == (1, 3)


def test_slices_with_parameters_of_their_own(project, tmp_path):
    a, b, c = (tensors(project, n) for n in "abc")

    def mean(first, second, name, own, other):
        return (first * own + second * other) / (own + other)

    def blend(rest, slice_index, t):
        common = 4.0 if "norm" in rest else at([0.3, 0.6], t)
        return (2.0, 0.5) if slice_index == 0 else (at([0.1, 0.9], t), common)

    expected = {}
    for out, (first, second, layers) in enumerate([(a, b, (1, 0)), (a, b, (2, 1)), (c, a, (0, 1)), (c, a, (1, 2))]):
        one, two = place(first, layers[0], out), place(second, layers[1], out)
        for name in one:
            expected[name] = mean(one[name], two[name], name, *blend(name, out // 2, out % 2))
    name = "model.embed_tokens.weight"
    expected[name] = mean(a[name], b[name], name, *blend(name, 0, 0.0))
    for name in ("model.norm.weight", "lm_head.weight"):
        expected[name] = mean(c[name], a[name], name, *blend(name, 1, 0.0))
    assert_close(run(project, tmp_path, STACKED_LINEAR), expected)


def test_dare_keeps_the_share_and_the_l1_norm(project, tmp_path):
    text = """
merge_method: dare_linear
base_model: base
models: [{model: a, parameters: {weight: 0.5, density: 0.53}}]
"""
    base, a, merged = tensors(project, "base"), tensors(project, "a"), run(project, tmp_path, text)
    kept = entries = 0
    for name in base:
        tau, delta = 0.5 * (a[name] - base[name]), merged[name].double() - base[name]
        assert float(delta.abs().sum()) == pytest.approx(float(tau.abs().sum()), rel=1e-4)
        there = delta.abs() > 1e-7
        ratio = (delta / tau)[there]
        assert float(ratio.max() - ratio.min()) < 1e-2
        kept, entries = kept + int(there.sum()), entries + there.numel()
    assert kept / entries == pytest.approx(0.53, abs=0.03)


def translated(project, text):
    path = project / "translated.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return Recipe.load(path)


def test_the_rule_and_its_options(project):
    recipe = translated(project, TIES)
    assert recipe.alpha == math.inf
    assert recipe.dtype == "float32"
    assert recipe.anchor.model_dump() == {
        "name": "ties",
        "threshold": "tensor",
        "tie": "positive",
        "scaling": 1.0,
        "normalize": True,
        "rescale": "none",
    }
    assert recipe.experts[0].parameters == {"weight": 1.0, "density": {"gradient": [1.0, 0.7, 0.1]}}


def test_precedence_of_slice_and_model_over_the_common_value(project):
    text = """
merge_method: linear
models: [{model: a, parameters: {weight: [{filter: mlp, value: 2}]}}, {model: b}]
parameters: {weight: [{filter: norm, value: [5, 6]}, {filter: "*", value: 1}]}
"""
    recipe = translated(project, text)
    rule = get_anchor("average").parameters(recipe.anchor_parameters)
    assert rule.at("layers.1.mlp", 0.5, 2)["weight"] == (2.0, 1.0)
    assert rule.at("layers.1.norm", 0.5, 2)["weight"] == (5.5, 5.5)
    assert rule.at("layers.1.attn", 0.5, 2)["weight"] == (1.0, 1.0)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_names_parameters_that_its_rule_has(method):
    own = METHODS[method]
    schema = {p["name"]: p for p in get_anchor(own.rule).schema}
    for parameter in own.parameters.values():
        assert schema[parameter.ours]["per_expert"] == parameter.each
    get_anchor(own.rule).parameters({**own.fixed, **own.with_base})
    get_anchor(own.rule).parameters({**own.fixed, **own.without_base})


def test_where_the_base_stands(project):
    with_base = "merge_method: nuslerp\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    recipe = translated(project, with_base)
    assert [e.label for e in recipe.experts] == ["a", "b"]
    assert recipe.anchor.parameters == {"origin": "base", "vectors": "tensor"}
    recipe = translated(project, with_base.replace("base_model: base\n", "") + "dtype: float16\nout_dtype: bfloat16\n")
    assert recipe.base == recipe.experts[0].model == str(project / "a")
    assert recipe.anchor.parameters["origin"] == "zero"
    assert recipe.dtype == "bfloat16"
    recipe = translated(project, with_base.replace("nuslerp", "linear"))  # there the base is one of those averaged
    assert [e.label for e in recipe.experts] == ["a", "b", "base"]
    assert recipe.base == str(project / "base")


def test_references_to_models(project):
    text = """
merge_method: task_arithmetic
base_model: org/name@v1
models:
  - model: org/name@v1+org/lora@v2
  - model: {model: org/name, lora: {path: org/lora, revision: v3}}
parameters: {weight: 1}
"""
    recipe = translated(project, text).plain()
    assert recipe["base"] == {"model": "org/name", "revision": "v1"}
    assert [e["model"] for e in recipe["experts"]] == [
        {"model": "org/name", "revision": "v1", "adapter": "org/lora", "adapter_revision": "v2"},
        {"model": "org/name", "adapter": "org/lora", "adapter_revision": "v3"},
    ]


def with_tokenizer(project, tmp_path, name, words):
    """A copy of a model with a tokenizer beside it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / name
    shutil.copytree(project / name, folder)
    numbers = {w: i for i, w in enumerate(["<unk>", *words])}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(numbers, unk_token="<unk>"))).save_pretrained(folder)


@pytest.mark.parametrize("source", ["tokenizer_source: base", "tokenizer: {source: union}", "tokenizer_source: a"])
def test_a_tokenizer_that_all_models_share(project, tmp_path, source):
    with_tokenizer(project, tmp_path, "base", ["one", "two"])
    with_tokenizer(project, tmp_path, "a", ["one", "two"])
    path = tmp_path / "config.yaml"
    text = f"merge_method: slerp\nbase_model: base\nmodels: [{{model: base}}, {{model: a}}]\nparameters: {{t: 0.5}}\n{source}\n"
    path.write_text(text)
    plan_recipe(Recipe.load(path))
    for file in (tmp_path / "a").glob("tokenizer*.json"):
        file.unlink()
    with pytest.raises(ConfigError, match="a: has no tokenizer file"):
        plan_recipe(Recipe.load(path))
    shutil.rmtree(tmp_path / "a")
    with_tokenizer(project, tmp_path, "a", ["two", "one"])
    with pytest.raises(ConfigError, match="2 tokens differ; 'one' is 2 there, 1 here"):
        plan_recipe(Recipe.load(path))


GOOD = {
    "merge_method": "linear",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"weight": 1},
}
SLICES = {"merge_method": "linear", "parameters": {"weight": 1}}

# Two models to merge in each slice, seen from a third in the first only.
MIXED_BASES = [
    {"base_model": "c", "sources": [{"model": m, "layer_range": [0, 1]} for m in "abc"]},
    {"sources": [{"model": m, "layer_range": [0, 1]} for m in "ab"]},
]


def slices(*ranges, **more):
    return {
        **SLICES,
        "slices": [{"sources": [{"model": m, "layer_range": r} for m, r in own]} for own in ranges],
        **more,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({**GOOD, "merge_method": "slurp"}, "merge_method 'slurp' is not known here; did you mean 'slerp'"),
        ({**GOOD, "parameter": {}}, "unknown key 'parameter'; did you mean 'parameters'"),
        ({**GOOD, "parameters": {"wieght": 1}}, r"'parameters\.wieght'; did you mean 'weight'"),
        ({**GOOD, "parameters": {}}, r"parameters\.weight of 'a' is missing; linear needs it"),
        ({**GOOD, "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}, "has values with a filter only"),
        ({**GOOD, "parameters": {"weight": "much"}}, r"parameters\.weight = 'much'"),
        ({**GOOD, "parameters": {"weight": [{"filter": "*mlp*", "value": 1}]}}, "taken to the letter"),
        (
            {**GOOD, "modules": {"default": {"models": [{"model": "a"}]}}},
            "exactly one of `models`, `slices` and `modules`",
        ),
        (
            {"merge_method": "linear", "parameters": {"weight": 1}, "modules": {"default": {}}},
            r"modules\.default: exactly one of `models` and `slices`",
        ),
        ({**GOOD, "models": [{"model": "a", "layer_range": [0, 1]}]}, r"unknown key 'models\.0\.layer_range'"),
        ({**GOOD, "models": [{"parameters": {}}]}, r"models\.0: the key 'model' is missing"),
        ({**GOOD, "models": "a"}, "models = 'a': it must be a list"),
        ({**GOOD, "models": [{"model": "a+b+c"}]}, "more than one '\\+'"),
        ({**GOOD, "slices": [{"sources": []}]}, "exactly one of `models` and `slices`"),
        ({**GOOD, "modules": {"x": {}}}, "modules: models of several parts"),
        (
            {**GOOD, "chat_template": "chatml"},
            "chat_template = 'chatml': the templates that mergekit has under names are not here; write `auto`",
        ),
        ({**GOOD, "tokenizer_source": "base"}, "tokenizer_source: base, but there is no base_model"),
        ({**GOOD, "tokenizer_source": "z"}, "tokenizer_source: 'z' is none of the models merged"),
        (
            {**GOOD, "tokenizer": {"source": "union", "tokens": {"x": {}}}},
            r"tokenizer\.tokens: embeddings are not rearranged",
        ),
        ({**GOOD, "dtype": "int8"}, "dtype = 'int8'"),
        ({**GOOD, "merge_method": "ties"}, "models: ties needs a base model to start from, but base_model is missing"),
        (slices([("a", [0, 1])], [("a", [0, 1]), ("b", [1, 2])]), r"slices: they merge \[1, 2\] models"),
        (slices([("a", [0, 1]), ("b", [1, 2])], [("a", [0, 1])]), r"slices: they merge \[1, 2\] models"),
        (
            {**slices([("a", [0, 1]), ("b", [0, 1])]), "merge_method": "nuslerp", "slices": MIXED_BASES},
            "slices: some have a base_model, some have none",
        ),
        (slices([("a", [0, 1]), ("b", [0, 2])]), r"slices\.0: its sources have \[1, 2\] layers"),
        (slices([("a", [0])]), r"slices\.0\.sources\.0\.layer_range = \[0\]"),
        (
            slices([("base", [0, 1])], merge_method="ties", base_model="base"),
            "there is no model beside the base",
        ),
        (
            slices([("a", [0, 1])], merge_method="ties", base_model="base"),
            r"slices\.0: ties needs a base model to start from, but base_model 'base' is not among its sources",
        ),
        (
            slices([("a", [1, 2])], parameters={"weight": [{"filter": "layers.1.", "value": 2}, {"value": 1}]}),
            "names a layer, and slices number layers anew",
        ),
    ],
)
def test_what_cannot_be_carried_over_names_the_key(project, text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        translated(project, text)
    assert "translated.yaml" in str(caught.value)


LAST = "model.norm.weight", "lm_head.weight"


def test_a_flag_may_be_any_number(project, tmp_path):
    a, b = tensors(project, "a"), tensors(project, "b")
    for number, total in ((1.0, 1.3), (1, 1.3), (0.0, 1.0), (0, 1.0), ("true", 1.3)):
        merged = run(project, tmp_path / str(number), LINEAR + f"parameters: {{normalize: {number}}}\n")
        assert_close(merged, {n: (a[n] + 0.3 * b[n]) / total for n in a})


def test_a_slice_of_no_layers_chooses_what_stands_after_them(project, tmp_path):
    a, b, c = (tensors(project, name) for name in "abc")
    text = slices([("a", [0, 3])], [("b", [3, 3])], merge_method="passthrough", parameters={})
    merged = run(project, tmp_path, yaml.safe_dump(text))
    assert_close(merged, {n: (b if n in LAST else a)[n] for n in a})
    # One at the beginning chooses the embedding, and its weights are its own.
    text = slices([("c", [0, 0]), ("b", [0, 0])], [("a", [0, 3]), ("b", [0, 3])])
    merged = run(project, tmp_path / "two", yaml.safe_dump(text))
    first = "model.embed_tokens.weight"
    assert_close(merged, {n: ((c if n == first else a)[n] + b[n]) / 2 for n in a})
    with pytest.raises(ConfigError, match="a stack of no layers; give at least one slice"):
        plan_recipe(translated(project, slices([("a", [1, 1])])))


@pytest.mark.parametrize("body", ["models", "slices"])
def test_the_one_module_of_a_model_that_has_one(project, tmp_path, body):
    a, b = tensors(project, "a"), tensors(project, "b")
    item = {"models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 0.5}}]}
    if body == "slices":
        item = {
            "slices": [
                {
                    "sources": [
                        {"model": m, "layer_range": [0, 3], "parameters": {"weight": w}}
                        for m, w in (("a", 2), ("b", 1))
                    ]
                }
            ]
        }
    text = {
        "merge_method": "linear",
        "modules": {"default": {**item, "parameters": {"weight": 1.0}}},
        "parameters": {"weight": 9.0},
    }
    merged = run(project, tmp_path, yaml.safe_dump(text))
    assert_close(merged, {n: (a[n] + 0.5 * b[n]) / 1.5 for n in a})


def test_keys_that_mergekit_passes_over(project, tmp_path, caplog):
    a, b = tensors(project, "a"), tensors(project, "b")
    text = slices([("a", [0, 3]), ("b", [0, 3])], random_seed=3)
    text["slices"][0] |= {"merge_method": "ties", "residual_weight": 0.5, "dtype": "float16"}
    text["slices"][0]["sources"][0]["merge_method"] = "slerp"
    assert_close(run(project, tmp_path, yaml.safe_dump(text)), {n: (a[n] + b[n]) / 2 for n in a})
    for key in ("slices.0.merge_method", "slices.0.residual_weight", "slices.0.sources.0.merge_method", "random_seed"):
        assert f"the key '{key}' has no effect (nor has it in mergekit)" in caplog.text


def test_a_model_that_is_listed_again_is_merged_once_with_its_first_parameters(project, tmp_path, caplog):
    a, b = tensors(project, "a"), tensors(project, "b")
    models = [("a", {"weight": [{"filter": "mlp", "value": 3}]}), ("b", {"weight": 1}), ("a", {"weight": 0.5})]
    text = {"merge_method": "linear", "models": [{"model": m, "parameters": p} for m, p in models]}
    weight = {n: 3 if "mlp" in n else 0.5 for n in a}
    merged = run(project, tmp_path, yaml.safe_dump(text))
    assert_close(merged, {n: (weight[n] * a[n] + b[n]) / (weight[n] + 1) for n in a})
    assert (
        "models.2 names 'a' again: it is merged once, as mergekit does, with the parameters of models.0" in caplog.text
    )
    # In a slice the layers of the last mention count.
    text = slices([("a", [0, 2]), ("b", [0, 2]), ("a", [1, 3])])
    merged = run(project, tmp_path / "two", yaml.safe_dump(text))
    expected = {n: (a[n] + b[n]) / 2 for n in a if layer_of(n) is None}
    for i in range(2):
        one, two = place(a, i + 1, i), place(b, i, i)
        expected |= {n: (one[n] + two[n]) / 2 for n in one}
    assert_close(merged, expected)


@pytest.mark.parametrize("name", ["a+b", "v1@2026", "x@1+y@2", "+a", "a@"])
def test_a_path_with_a_plus_or_an_at_is_taken_whole(project, tmp_path, name):
    shutil.copytree(project / "b", project / name, dirs_exist_ok=True)
    a, b = tensors(project, "a"), tensors(project, "b")
    text = {"merge_method": "linear", "models": [{"model": "a"}, {"model": name}], "parameters": {"weight": 1}}
    assert_close(run(project, tmp_path, yaml.safe_dump(text)), {n: (a[n] + b[n]) / 2 for n in a})
    adapted = tensors(project, "b+lora")
    text["models"][1] = {"model": f"{name}+lora"}
    assert_close(run(project, tmp_path / "two", yaml.safe_dump(text)), {n: (a[n] + adapted[n]) / 2 for n in a})
    text["models"][1] = {"model": {"model": {"path": name}, "lora": "lora"}}
    assert_close(run(project, tmp_path / "three", yaml.safe_dump(text)), {n: (a[n] + adapted[n]) / 2 for n in a})
    shutil.rmtree(project / name)


def test_a_chat_template_is_that_of_most_models_or_the_text(project, tmp_path):
    long, other = "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages[0].content }}!!"
    for name, template in (("base", other), ("a", long), ("b", long), ("c", None)):
        with_tokenizer(project, tmp_path, name, ["one", "two"])
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        if name == "a":
            (tmp_path / name / "chat_template.jinja").write_text(f"{template}\n")
        elif template:
            config["chat_template"] = [{"name": "default", "template": template}] if name == "b" else template
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    path = tmp_path / "config.yaml"
    raw = {
        "merge_method": "linear",
        "base_model": "base",
        "models": [{"model": m} for m in ("base", "a", "b", "c")],
        "parameters": {"weight": 1},
    }
    for asked, expected in (("auto", long), (f"{long}again", f"{long}again"), (None, other)):
        path.write_text(yaml.safe_dump({**raw, "chat_template": asked}))
        out = run_recipe(Recipe.load(path), tmp_path / "out", overwrite=True, progress=False).path
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert tokenizer.chat_template == expected
        text = json.loads((out / "tokenizer_config.json").read_text())
        assert ("chat_template" in text) == (asked is None)
    with pytest.raises(ConfigError, match=r"chat_template.*'plain' is no template"):
        Recipe.parse({"base": "b", "experts": ["a"], "chat_template": "plain"})


def test_a_range_outside_the_model(project):
    with pytest.raises(ConfigError, match=r"a: layers \[1, 9\] are not a range within its 3 layers"):
        plan_recipe(translated(project, slices([("a", [1, 9])])))


def test_a_parameter_without_effect_is_said(project, caplog):
    translated(project, {**GOOD, "parameters": {"weight": 1, "density": 0.5, "int8_mask": True}})
    assert "parameters.density has no effect on merge_method linear" in caplog.text
    assert "int8_mask" not in caplog.text


def test_the_command_line_takes_it_too(project, tmp_path, monkeypatch, capsys):
    (project / "config.yml").write_text(FRANKENMERGE)
    for arguments in (["inspect"], ["merge", "-o", str(tmp_path / "out")]):
        monkeypatch.setattr("sys.argv", ["bmm", *arguments, str(project / "config.yml"), "--json", "--offline"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
    plan, merged = (json.loads(part) for part in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0"))
    assert plan["anchor"] == "passthrough"
    assert plan["solved_modules"] == 0
    assert merged["tensors_from_anchor"] == len(plan["from_anchor"]) == 6 * 9 + 3


def of_models(method, parameters="", names="abc", base=True):
    models = "".join(f"  - model: {name}\n" for name in names)
    return f"merge_method: {method}\n{'base_model: base' if base else ''}\nmodels:\n{models}parameters:\n  int8_mask: false\n{parameters}"


WEIGHT = "  weight: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.6}]\n"
PEERS = {
    "slerp": SLERP,
    "ties": TIES,
    "linear": LINEAR,
    "task arithmetic": TASK_ARITHMETIC,
    "frankenmerge": FRANKENMERGE,
    "stacked linear": STACKED_LINEAR,
    "stacked slerp": """
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
    base_model: a
  - sources: [{model: c, layer_range: [2, 3]}, {model: b, layer_range: [0, 1]}]
    base_model: b
merge_method: slerp
base_model: a
parameters: {t: [{filter: mlp, value: [0.9, 0.1]}, {value: 0.3}]}
""",
    "linear with a base": of_models("linear", "  weight: 0.7\n"),
    "task arithmetic, normalized": of_models("task_arithmetic", f"{WEIGHT}  normalize: true\n  lambda: 0.8\n"),
    "ties, rescaled": of_models("ties", f"{WEIGHT}  density: 0.4\n  rescale: true\n  normalize: false\n"),
    "dare of everything": of_models("dare_ties", f"{WEIGHT}  density: 1\n"),
    "breadcrumbs": of_models("breadcrumbs", f"{WEIGHT}  density: 0.7\n  gamma: 0.05\n"),
    "breadcrumbs_ties": of_models("breadcrumbs_ties", f"{WEIGHT}  density: [0.9, 0.5]\n  lambda: 1.1\n"),
    "della of everything": of_models("della", f"{WEIGHT}  lambda: [0.5, 1]\n"),
    "della_linear of everything": of_models("della_linear", WEIGHT),
    "sce": of_models("sce", "  select_topk: 0.4\n"),
    "sce, default": of_models("sce"),
    "model_stock": of_models("model_stock"),
    "model_stock by filters": of_models("model_stock", "  filter_wise: true\n"),
    "karcher": of_models("karcher", base=False),
    "multislerp": of_models("multislerp", WEIGHT),
    "multislerp without a base": of_models("multislerp", f"{WEIGHT}  normalize_weights: false\n", base=False),
    "nuslerp": of_models("nuslerp", WEIGHT, "ab"),
    "nuslerp by rows": of_models("nuslerp", f"{WEIGHT}  nuslerp_flatten: false\n", "ab", base=False),
    "nuslerp by columns": of_models("nuslerp", f"{WEIGHT}  nuslerp_flatten: false\n  nuslerp_row_wise: true\n", "ab"),
    "nearswap": of_models("nearswap", "  t: [0.001, 0.05]\n", "a"),
    # In float32 mergekit loses which entries matter: their importance is what is left of terms that cancel.
    "arcee_fusion": of_models("arcee_fusion", "", "a") + "dtype: float64\n",
    "ram": of_models("ram", "  epsilon: 0.05\n"),
    "ramplus_tl": of_models("ramplus_tl", "  epsilon: 0.05\n  r: 0.3\n"),
    "passthrough": of_models("passthrough", "  scale: [{filter: norm, value: 0.5}]\n", "a", base=False),
}


@pytest.mark.peers
@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in PEERS.items()])
def test_mergekit_itself_gives_the_same(project, tmp_path, text, monkeypatch):
    """Runs mergekit 0.1.5 where it is installed: `pytest -m peers`."""
    pytest.importorskip("mergekit")
    monkeypatch.chdir(project)  # mergekit takes paths from there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        options = MergeOptions(
            copy_tokenizer=False, write_model_card=False, lora_merge_cache=str(tmp_path / "loras"), quiet=True
        )
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(tmp_path / "theirs"), options)
    theirs = {}
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        theirs |= load_file(file)
    assert_close(run(project, tmp_path, text), theirs, 1e-5)
    config = [json.loads((tmp_path / own / "config.json").read_text()) for own in ("theirs", "out")]
    assert config[0]["num_hidden_layers"] == config[1]["num_hidden_layers"]

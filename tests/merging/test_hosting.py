"""A host: the output is its checkpoint, with merged tensors in the place of its own, and with all that only it has."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

import bmm_engine as bmm
from bmm_engine.anchors.calibration.svc import svc
from bmm_engine.checkpoint.names import change_prefix, prefix_exchanges
from bmm_engine.errors import ConfigError, MissingTensorError, ShapeMismatchError
from bmm_engine.pipeline.run import plan_recipe, prepare_recipe
from bmm_engine.recipe.recipe import Recipe
from tests.checkpoint.test_adapter import pair
from tests.checkpoint.test_adapter import write as write_adapter
from tests.tiny import _TEXT, fine_tune, make_base, make_batches, save

TEXT = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False}
VISION = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 20,
    "image_size": 16,
    "patch_size": 8,
}
IP = {"anchor": "ip_merging", "alpha": math.inf}
NOTHING = {**IP, "anchor_parameters": {"theta": 1.1}}


class People:
    """A language model in float16, two donors, and a host in bfloat16 that sees: by live names, as its files have them (`language_model.model.`)."""

    def __init__(self, folder, rows=60):
        torch.manual_seed(0)
        live = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).to(torch.float16)
        seeing = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(**{**TEXT, "vocab_size": rows}),
                vision_config=transformers.CLIPVisionConfig(**VISION),
            )
        ).to(torch.bfloat16)
        state = seeing.state_dict()
        for name, tensor in fine_tune(live, 9).state_dict().items():
            own = name if name == "lm_head.weight" else f"model.language_model.{name.removeprefix('model.')}"
            state[own][: len(tensor)].copy_(tensor)
        self.base = save(live, folder / "base")
        self.donors = [save(fine_tune(live, seed), folder / f"donor-{seed}") for seed in (1, 2)]
        self.host = save(seeing, folder / "host")
        (self.host / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
        self.experts = [self.host, *self.donors]
        self.files = load_file(self.host / "model.safetensors")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return People(tmp_path_factory.mktemp("people"))


def different(first, second):
    assert set(first) == set(second)
    return {n for n in first if first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])}


def test_no_aligned_direction_gives_the_hosts_checkpoint_bit_for_bit(people, tmp_path):
    bmm.merge(people.base, people.experts, **NOTHING, output=tmp_path / "out")
    assert different(load_file(tmp_path / "out" / "model.safetensors"), people.files) == set()
    for name in ("processor_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (people.host / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava"
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert isinstance(model, transformers.LlavaForConditionalGeneration)
    record = json.loads((tmp_path / "out" / "bmm_merge.json").read_text())
    assert record["recipe"]["base"] == str(people.base)
    assert [entry["role"] for entry in record["inputs"]] == ["base", "expert 1", "expert 2", "expert 3"]


def test_what_donors_bring_is_in_the_language_model_and_nowhere_else(people):
    result = bmm.merge(people.base, people.experts, **IP, anchor_parameters={"theta": 0.0})
    changed = different(result.tensors, people.files)
    assert len(changed) == 14  # seven linear modules in each of two layers
    assert all(n.startswith("language_model.model.layers.") for n in changed)
    name = "layers.0.mlp.up_proj.weight"
    base = load_file(people.base / "model.safetensors")[f"model.{name}"].double()
    donors = [load_file(d / "model.safetensors")[f"model.{name}"].double() for d in people.donors]
    own = people.files[f"language_model.model.{name}"].double()
    truth = bmm.get_anchor("ip_merging")(base, [own, *donors], theta=0.0)
    merged = result.tensors[f"language_model.model.{name}"].double()
    torch.testing.assert_close(merged, truth.to(torch.bfloat16).double(), rtol=1e-2, atol=1e-3)


def test_the_record_says_what_is_the_hosts(people):
    tensors = bmm.merge(people.base, people.experts, **NOTHING).summary()["tensors"]
    count = len(people.files)
    assert {r: t["tensors"] for r, t in tensors[str(people.base)].items()} == {"rule": 21}
    assert {r: t["tensors"] for r, t in tensors[str(people.host)].items()} == {"rule": 21, "host": count - 21}
    assert {r: t["tensors"] for r, t in tensors[str(people.donors[0])].items()} == {"rule": 21}


def test_unequal_vocabularies_keep_the_hosts(tmp_path):
    people = People(tmp_path, rows=64)
    result = bmm.merge(people.base, people.experts, **NOTHING)
    assert different(result.tensors, people.files) == set()
    (note,) = result.plan.notes
    assert f"{people.base}: has other rows in language_model.lm_head.weight" in note
    assert f"the host {people.host}" in note
    with pytest.raises(ConfigError, match="vocabulary: pad does not go with a host"):
        bmm.merge(people.base, people.experts, **NOTHING, vocabulary="pad")
    # A donor alone with other rows
    larger = transformers.LlamaForCausalLM.from_pretrained(people.donors[0])
    larger.resize_token_embeddings(66, mean_resizing=False)
    wide = People(tmp_path / "equal")
    experts = [wide.host, save(larger.to(torch.float16), tmp_path / "larger")]
    result = bmm.merge(wide.base, experts, **NOTHING)
    assert different(result.tensors, wide.files) == set()
    assert [note.split(":")[0] for note in result.plan.notes] == [str(experts[1])]


def test_any_rule_may_have_a_host_and_solves_beside_it(people):
    """By place or name, wherever it is listed; what is merged is what would be without the rest of the host."""
    merged, calibrated = (
        bmm.merge(
            people.base,
            [people.donors[0], people.host],
            anchor="task_arithmetic",
            host=1,
            alpha=math.inf,
            calibrate=calibrate,
        ).tensors
        for calibrate in (None, "svc")
    )
    assert merged.keys() == people.files.keys()
    name = "layers.1.self_attn.q_proj.weight"
    base, donor = (load_file(f / "model.safetensors")[f"model.{name}"].float() for f in (people.base, people.donors[0]))
    own = people.files[f"language_model.model.{name}"].float()
    scaling = bmm.get_anchor("task_arithmetic").defaults["scaling"]
    truth = base + scaling * (donor + own - 2 * base)
    torch.testing.assert_close(merged[f"language_model.model.{name}"].float(), truth, rtol=1e-2, atol=1e-3)
    start, *taus = (t.double() - base.double() for t in (truth, donor, own))
    wanted = (base + svc(start, taus)).float()
    torch.testing.assert_close(calibrated[f"language_model.model.{name}"].float(), wanted, rtol=1e-2, atol=1e-3)
    assert float((wanted - truth).abs().max()) > 0.01
    solved = bmm.plan_merge(people.base, [people.donors[0], people.host], anchor="tsv_m", host="host")
    assert solved.module_count == 14


def test_the_host_comes_first_for_its_rule_wherever_it_is_listed(people):
    first = bmm.merge(people.base, people.experts, **IP)
    last = bmm.merge(people.base, [*people.donors, people.host], **IP, host=2)
    assert different(first.tensors, last.tensors) == set()
    assert first.plan.alignment.host == 0


def recipe_of(people, **keys):
    experts = [{"model": str(path), "name": f"name {i}"} for i, path in enumerate(people.experts)]
    return Recipe.parse({"base": str(people.base), "experts": experts, "anchor": "ip_merging", "alpha": "inf", **keys})


def test_a_recipe_names_its_host(people, tmp_path):
    assert plan_recipe(recipe_of(people)).alignment.host == 0
    assert plan_recipe(recipe_of(people, host="name 0")).alignment.host == 0
    assert plan_recipe(recipe_of(people, host=str(people.donors[0]))).alignment.host == 1
    prepare_recipe(recipe_of(people, host="name 0", anchor={"name": "ip_merging", "theta": 1.1})).merge(
        tmp_path / "out"
    )
    assert different(load_file(tmp_path / "out" / "model.safetensors"), people.files) == set()


def test_a_host_that_is_none_is_refused(people):
    for host, words in [(3, "host is 3.*last of the 3 experts is 2"), ("nobody", "host is 'nobody', but no expert")]:
        with pytest.raises(ConfigError, match=words):
            bmm.merge(people.base, people.experts, **IP, host=host)
    with pytest.raises(ConfigError, match="host"):
        bmm.merge(people.base, people.experts, **IP, host=-1)
    with pytest.raises(ConfigError, match="two experts are called so"):
        bmm.merge(people.base, [people.donors[0], people.donors[0]], **IP, host="donor-1")


def test_what_is_kept_from_the_base_is_its_under_either_name(people):
    held = state(people.base)
    for pattern in ("model.embed_tokens.*", "language_model.model.embed_tokens.*"):
        merged = bmm.merge(people.base, people.experts, **NOTHING, keep_base=pattern)
        name = "language_model.model.embed_tokens.weight"
        assert different(merged.tensors, people.files) == {name}
        assert torch.equal(merged.tensors[name], held["model.embed_tokens.weight"].to(torch.bfloat16))
        assert merged.summary()["tensors"][str(people.base)]["base"]["first"] == ["model.embed_tokens.weight"]


def test_a_head_that_the_host_lacks_may_be_left_out(people):
    """An error without a word; with one the output has none, as the host."""
    bare = {n: t for n, t in people.files.items() if "lm_head" not in n}
    experts, options = [bare, *map(state, people.donors)], {**NOTHING, "modules": ["*proj"]}
    with pytest.raises(MissingTensorError, match=r"'lm_head\.weight'"):
        bmm.merge(state(people.base), experts, **options)
    assert different(bmm.merge(state(people.base), experts, **options, keep_base="lm_head.*").tensors, bare) == set()


def test_a_host_of_another_network_is_not_walked(people):
    batches = [make_batches("llama", seed, 1) for seed in range(3)]
    with pytest.raises(ConfigError, match=r"host: is the host, and of another network.*mode: plain"):
        bmm.merge_sequential(people.base, people.experts, batches, anchor="ip_merging")


def test_a_host_that_lacks_what_the_base_has_or_is_of_another_size_is_refused(people, tmp_path):
    with pytest.raises(MissingTensorError, match=r"expert 0.*has no tensor 'model\.layers\.0"):
        bmm.merge(state(people.base), [lacking(people), *people.donors], **NOTHING, modules=["*proj"])
    small = {n: t[:3] if n.endswith("0.self_attn.q_proj.weight") else t for n, t in people.files.items()}
    with pytest.raises(ShapeMismatchError, match=r"q_proj\.weight: shape \(16, 16\).*\(3, 16\)"):
        bmm.merge(state(people.base), [small, *people.donors], **NOTHING, modules=["*proj"])


def state(folder):
    return load_file(folder / "model.safetensors")


def lacking(people):
    """The host as a state dict without one of its layers' tensors."""
    return {n: t for n, t in people.files.items() if not n.endswith("0.self_attn.q_proj.weight")}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_live_models_of_one_network_need_no_more_than_the_first_as_host(architecture):
    """The same names, tied heads and transposed weights included; a walk goes on it too."""
    base = make_base(architecture)
    experts = [fine_tune(base, seed) for seed in (1, 2)]
    merged = bmm.merge(base, experts, **NOTHING).tensors
    assert different(merged, experts[0].state_dict()) == set()
    batches = [make_batches(architecture, seed, 2) for seed in range(2)]
    walked = bmm.merge_sequential(base, experts, batches, anchor="ip_merging", alpha=1e9).tensors
    rule = bmm.merge(base, experts, anchor="ip_merging", alpha=math.inf).tensors
    for name, tensor in rule.items():
        torch.testing.assert_close(walked[name], tensor, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_a_host_too(tmp_path):
    """Its base's files stand beside the output, in the base's dtype."""
    model = make_base("llama").to(torch.bfloat16)
    base, donor = save(model, tmp_path / "base"), save(fine_tune(model, 1), tmp_path / "donor")
    module = "model.layers.0.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "adapter", pair(module, 16, 16))
    alone = bmm.merge(base, [adapter], anchor="average", alpha=math.inf).tensors
    merged = bmm.merge(base, [adapter, donor], **NOTHING).tensors
    assert different(merged, alone) == set()
    assert not torch.equal(merged[f"{module}.weight"], model.state_dict()[f"{module}.weight"])


def test_prefixes_that_take_each_others_place():
    assert change_prefix("-model.+model.language_model.", "model.layers.0.w") == "model.language_model.layers.0.w"
    assert change_prefix("-model.+model.language_model.", "lm_head.weight") == "lm_head.weight"
    changes = prefix_exchanges(["model.layers.0.w"], ["model.language_model.layers.0.w", "vision.x.w"])
    assert changes[0] == "-model.+vision."
    assert "-model.+model.language_model." in changes

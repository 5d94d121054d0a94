"""One tensor by whatever name: hub, live, older or wrapped, in base, experts, adapters and Grams alike."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bmm_engine as bmm
from bmm_engine.errors import BmmError, MissingTensorError
from bmm_engine.merging.accounting import loads_back
from bmm_engine.models.naming import Naming
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from tests.odd import changed, in_layout, people, tensors
from tests.tiny import fine_tune, make_base, make_batches

LAYOUTS = [
    ("live", "live", "live"),
    ("hub", "hub", "live"),
    ("live", "hub", "hub"),
    ("_orig_mod.", "hub", "live"),
    ("hub", "_orig_mod.", "module._orig_mod."),
    ("live", "net.model.", "hub"),
]
SOLVED = {"vit": 12, "segformer": 24, "llava": 28, "qwen2.5-vl": 26, "wav2vec2": 7, "gpt2": 8}


def by_live_name(model, merged):
    live = Naming.of(model).known(merged)
    return {live[name]: tensor for name, tensor in merged.items()}


@pytest.mark.parametrize("family", SOLVED)
def test_the_same_modules_are_solved_to_the_same_bits_in_every_layout(family, tmp_path):
    base, experts, path, paths = people(family, tmp_path)
    expected = bmm.merge(path, paths)
    assert len(expected.modules) == SOLVED[family]
    reference = by_live_name(base, expected.tensors)
    for layouts in LAYOUTS:
        own = [in_layout(p, m, how) for p, m, how in zip((path, *paths), (base, *experts), layouts, strict=True)]
        result = bmm.merge(own[0], own[1:])
        assert len(result.modules) == SOLVED[family], layouts
        assert not any(result.summary()["left_out_of_experts"].values())
        found = by_live_name(base, result.tensors)
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[name], reference[name]) for name in reference), layouts


@pytest.mark.parametrize("layout", ["live", "_orig_mod.", "module._orig_mod.", "net.model."])
def test_what_is_written_has_the_bases_names_and_loads(layout, tmp_path):
    from transformers import ViTForImageClassification

    base, experts, path, paths = people("vit", tmp_path)
    own = in_layout(path, base, layout)
    written = bmm.merge(own, paths, alpha=math.inf, output=tmp_path / "out").path
    assert loads_back(written) == ""
    assert tensors(written).keys() == (tensors(own) if layout == "live" else tensors(path)).keys()
    loaded, report = ViTForImageClassification.from_pretrained(written, output_loading_info=True)
    assert not report["missing_keys"]
    for name, parameter in loaded.named_parameters():
        mean = torch.stack([dict(m.named_parameters())[name].double() for m in experts]).mean(0)
        torch.testing.assert_close(parameter.double(), mean, rtol=0, atol=2e-7)


def test_names_in_memory_are_the_callers(tmp_path):
    base, experts, _, _ = people("bert", tmp_path)
    wrapped = {f"_orig_mod.{n}": t for n, t in base.state_dict().items()}
    result = bmm.merge(wrapped, [m.state_dict() for m in experts], modules=["*attention.self*"])
    assert result.tensors.keys() == wrapped.keys()
    assert len(result.modules) == 6
    compiled = torch.compile(base, backend="eager")
    assert len(bmm.merge(compiled, experts).modules) == 13


@pytest.mark.parametrize("layouts", [("live", "live", "live"), ("hub", "live", "_orig_mod."), ("live", "hub", "live")])
def test_grams_fit_every_layout(layouts, tmp_path):
    base, experts, path, paths = people("vit", tmp_path)
    grams = [bmm.collect_grams(m, make_batches("vit", i)) for i, m in enumerate(experts)]
    saved = [g.save(tmp_path / f"{i}.safetensors") for i, g in enumerate(grams)]
    reference = by_live_name(base, bmm.merge(path, paths, grams=grams).tensors)
    own = [in_layout(p, m, how) for p, m, how in zip((path, *paths), (base, *experts), layouts, strict=True)]
    for given in (grams, saved):
        result = bmm.merge(own[0], own[1:], grams=given)
        assert len(result.modules) == 12
        found = by_live_name(base, result.tensors)
        assert all(torch.equal(found[name], reference[name]) for name in reference)


def test_grams_of_a_model_that_is_wrapped(tmp_path):
    _, experts, path, paths = people("bert", tmp_path)
    grams = [bmm.collect_grams(m, make_batches("bert", i)) for i, m in enumerate(experts)]
    for gram in grams:
        gram.aliases |= {name: f"module.{name}" for name in gram.modules}
        gram.modules = {f"module.{name}": group for name, group in gram.modules.items()}
        gram.fingerprints = {f"module.{name}": mark for name, mark in gram.fingerprints.items()}
    assert len(bmm.merge(path, paths, grams=grams).modules) == 13
    parallel = nn.DataParallel(experts[0])
    assert set(bmm.collect_grams(parallel, make_batches("bert", 0)).aliases) == {
        name.removeprefix("module.") for name in grams[0].modules
    }


def test_patterns_know_all_names(tmp_path):
    base, _, path, paths = people("vit", tmp_path)
    live = in_layout(path, base, "live")
    for pattern in ("*attention.attention.query", "*attention.q_proj"):
        assert len(bmm.plan_merge(live, paths, modules=[pattern]).groups) == 2
        assert len(bmm.plan_merge(path, paths, modules=[pattern]).groups) == 2
    wrapped = in_layout(path, base, "_orig_mod.")
    for pattern in ("_orig_mod.classifier.*", "classifier.*"):
        assert len(bmm.plan_merge(wrapped, paths, keep_base=[pattern]).from_base) == 2


def test_weight_norm_of_two_versions(tmp_path):
    base, _, path, paths = people("wav2vec2", tmp_path)
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}

    def older(held):
        for name in list(held):
            for new, ending in old.items():
                if name.endswith(new):
                    held[name.removesuffix(new) + ending] = held.pop(name)

    def newer(held):
        for name in list(held):
            for new, ending in old.items():
                if name.endswith(ending):
                    held[name.removesuffix(ending) + new] = held.pop(name)

    expected = by_live_name(base, bmm.merge(path, paths, alpha=math.inf).tensors)
    for spelled in ((older, newer, older), (newer, older, newer)):
        own = [changed(p, f) for p, f in zip((path, *paths), spelled, strict=True)]
        for given in (own, [tensors(p) for p in own]):
            found = by_live_name(base, bmm.merge(given[0], given[1:], alpha=math.inf).tensors)
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_of_a_base_under_live_names(tmp_path):
    base, _, path, _ = people("vit", tmp_path, experts=0)
    (tmp_path / "adapter").mkdir()
    factors = {}
    for part in ("layers.0.attention.q_proj", "encoder.layer.1.attention.attention.query"):
        stem = f"base_model.model.vit.{part}"
        factors |= {f"{stem}.lora_A.weight": torch.randn(2, 16), f"{stem}.lora_B.weight": torch.randn(16, 2)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "query"]}'
    )
    for layout in ("hub", "live", "_orig_mod."):
        result = bmm.merge(in_layout(path, base, layout), [tmp_path / "adapter"], alpha=math.inf)
        merged = by_live_name(base, result.tensors)
        for number, part in enumerate(("layers.0.attention.q_proj", "encoder.layer.1.attention.attention.query")):
            a, b = (factors[f"base_model.model.vit.{part}.lora_{x}.weight"].double() for x in "AB")
            name = f"vit.layers.{number}.attention.q_proj.weight"
            change = merged[name].double() - base.state_dict()[name].double()
            torch.testing.assert_close(change, b @ a, rtol=1e-5, atol=1e-6)


def test_other_names_are_a_line_in_the_log(tmp_path, caplog):
    base, experts, path, paths = people("vit", tmp_path)
    with caplog.at_level(logging.INFO, logger="bmm_engine"):
        bmm.plan_merge(in_layout(path, base, "_orig_mod."), [in_layout(paths[0], experts[0], "live"), paths[1]])
    assert "expert-0-live: 32 of 40 tensors go by another name than the base's" in caplog.text
    assert "base-_orig_mod: 40 of its names do not load as they are, such as '_orig_mod." in caplog.text


def test_prefixes_of_several_parts_without_an_architecture(tmp_path):
    state = make_base("bert").state_dict()
    experts = [fine_tune(make_base("bert"), s).state_dict() for s in (1, 2)]
    expected = bmm.merge(state, experts, alpha=math.inf).tensors
    shifted = [{f"outer.inner.model.{n}": t for n, t in e.items()} for e in experts]
    found = bmm.merge(state, shifted, alpha=math.inf).tensors
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    found = bmm.merge(shifted[0], [state, experts[1]], alpha=math.inf).tensors
    assert all(n.startswith("outer.inner.model.") for n in found)


def test_names_that_nobody_knows_are_said(tmp_path):
    _, _, path, paths = people("bert", tmp_path)
    changed(
        paths[0], lambda held: held.update({n.replace("query", "wq"): held.pop(n) for n in list(held) if "query" in n})
    )
    with pytest.raises(
        MissingTensorError, match=r"no tensor 'bert.*query.*'.*It has 'bert.*wq.*' of the same shape.*one layout"
    ):
        bmm.plan_merge(path, paths)


@pytest.mark.parametrize(("family", "count"), [("mixtral", 8), ("qwen2-moe", 16)])
def test_mixtures_that_one_layout_fuses(family, count, tmp_path):
    base, experts, path, paths = people(family, tmp_path)
    expected = type(base).from_pretrained(bmm.merge(path, paths, output=tmp_path / "expected").path).state_dict()
    stack = next(n for n in expected if n.endswith("experts.down_proj"))
    mean = torch.stack([m.state_dict()[stack].double() for m in experts]).mean(0)
    torch.testing.assert_close(expected[stack].double(), mean, rtol=0, atol=1e-7)
    for given in (
        [base, *experts],
        [path, *experts],
        [path, *(in_layout(p, m, "live") for p, m in zip(paths, experts, strict=True))],
        [in_layout(path, base, "_orig_mod."), experts[0], in_layout(paths[1], experts[1], "_orig_mod.")],
        [in_layout(path, base, "live"), *paths],
        [in_layout(path, base, "live"), experts[0], in_layout(paths[1], experts[1], "_orig_mod.")],
    ):
        result = bmm.merge(given[0], given[1:], output=tmp_path / "out", overwrite=True)
        assert len(result.modules) == count
        assert loads_back(result.path) == ""
        assert not any(result.summary()["left_out_of_experts"].values())
        found = type(base).from_pretrained(result.path).state_dict()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)


def test_a_mixture_that_lacks_one_of_its_experts_is_incomplete(tmp_path):
    base, experts, path, paths = people("mixtral", tmp_path)
    state = experts[0].state_dict()
    state.pop("model.layers.1.mlp.experts.down_proj")
    with pytest.raises(MissingTensorError, match=r"experts\.0\.w2"):
        bmm.plan_merge(path, [state])
    changed(paths[0], lambda held: held.pop("model.layers.1.block_sparse_moe.experts.1.w2.weight"))
    with pytest.raises(BmmError, match=r"experts"):
        bmm.plan_merge(in_layout(path, base, "live"), paths)


@pytest.mark.parametrize("family", ["vit", "gpt2"])
@pytest.mark.parametrize("mode", ["plain", "sequential"])
def test_measured_and_walked_in_every_layout_by_a_recipe(family, mode, tmp_path):
    base, experts, path, paths = people(family, tmp_path)
    for number in range(2):
        batches = make_batches(family, number)
        inputs = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
        save_file(inputs, tmp_path / f"{number}.safetensors")

    def run(base, experts, name):
        recipe = {
            "base": str(base),
            "mode": mode,
            "experts": [
                {"model": str(e), "calibration": str(tmp_path / f"{t}.safetensors")} for t, e in enumerate(experts)
            ],
        }
        result = run_recipe(Recipe.parse(recipe), tmp_path / name, progress=False)
        assert len(result.modules) == SOLVED[family]
        return by_live_name(base_model, tensors(result.path))

    base_model = base
    expected = run(path, paths, "expected")
    for number, layouts in enumerate(
        (("hub", "live", "_orig_mod."), ("_orig_mod.", "hub", "net.model."), ("live", "hub", "live"))
    ):
        own = [in_layout(p, m, how) for p, m, how in zip((path, *paths), (base, *experts), layouts, strict=True)]
        found = run(own[0], own[1:], f"out-{number}")
        assert all(torch.equal(found[name], expected[name]) for name in expected if name in found), layouts
        assert found.keys() >= expected.keys() - {"lm_head.weight"}

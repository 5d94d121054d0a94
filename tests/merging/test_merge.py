"""Whole merges of tiny BERT, GPT-2, ViT and Llama checkpoints, loaded back by transformers, against the float64 reference."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from bmm_engine import collect_grams, merge
from bmm_engine.errors import CheckpointError
from bmm_engine.merging.stream import BATCH_BYTES
from tests.numerics import relative_error
from tests.reference_merge import reference_merge
from tests.tiny import family, fine_tune, make_base, make_batches, save

ARCHITECTURES = ["bert", "gpt2", "vit", "llama"]


def outputs(model, architecture):
    with torch.inference_mode():
        return model(**make_batches(architecture, 99, 1)[0]).logits


MERGES = {
    "data": {},
    "scaled": {"alpha": 1e-3, "scale": 1.3},
    "energy": {"task_weights": "energy"},
    "data-free": {"gram_source": "task_vectors"},
    "hybrid": {"gram_source": "hybrid", "hybrid": 0.3},
    "anchor": {"alpha": math.inf, "prior": 2.0},
}
# What does not depend on the kind of network.
ONCE = {
    "bert": {"overshot": {"alpha": 1.0, "prior": 2.2}},
    "gpt2": {"frobenius": {"task_weights": "frobenius"}},
    "vit": {},
    "llama": {"frobenius hybrid": {"task_weights": "frobenius", "gram_source": "hybrid", "hybrid": 0.3}},
}


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        pytest.param(options, architecture, id=f"{name}-{architecture}")
        for architecture in ARCHITECTURES
        for name, options in (MERGES | ONCE[architecture]).items()
    ],
)
def test_checkpoint_merge_equals_the_reference(architecture, options, tmp_path):
    base, experts, base_path, paths = family(architecture, tmp_path)
    batches = [make_batches(architecture, 10 + t) for t in range(2)]
    options = {"alpha": 0.1, **options}
    source = options.pop("gram_source", "data")
    grams = (
        "task_vectors"
        if source == "task_vectors"
        else [
            collect_grams(e, b).save(tmp_path / f"g{t}.safetensors") for t, (e, b) in enumerate(zip(experts, batches))
        ]
    )
    result = merge(base_path, paths, grams=grams, output=tmp_path / "merged", **options)
    loaded, info = type(base).from_pretrained(result.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights = options.pop("task_weights", None)
    options |= {"energy": weights == "energy", "frobenius": weights == "frobenius"}
    # Grams are stored in float32: their rounding reaches the solution multiplied by the condition number, at most in / alpha.
    tolerance = torch.finfo(torch.float32).eps * (16 + 2 / options["alpha"])
    truth = reference_merge(base, experts, batches, gram_source=source, share=options.pop("hybrid", 0.5), **options)
    own = loaded.state_dict()
    for name, tensor in truth.state_dict().items():
        if tensor.is_floating_point():
            assert relative_error(own[name], tensor.double()) < tolerance, name
    assert relative_error(outputs(loaded, architecture), outputs(truth.float(), architecture).double()) < 1e-3


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_fit_bias_equals_the_reference(architecture):
    base = make_base(architecture)
    experts = [fine_tune(base, seed) for seed in (1, 2)]
    batches = [make_batches(architecture, 10 + t) for t in range(2)]
    grams = [collect_grams(e, b) for e, b in zip(experts, batches)]
    result = merge(base, experts, grams=grams, alpha=0.05, fit_bias=True)
    truth = reference_merge(base, experts, batches, alpha=0.05, fit_bias=True).state_dict()
    for name, tensor in result.tensors.items():
        assert relative_error(tensor, truth[name].double()) < 2e-6, name
    plain = merge(base, experts, grams=grams, alpha=0.05)
    assert any(not torch.equal(plain.tensors[n], t) for n, t in result.tensors.items() if n.endswith("bias"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_paths_state_dicts_and_live_models_give_the_same_bits(architecture, tmp_path):
    base, experts, base_path, paths = family(architecture, tmp_path)
    grams = [collect_grams(e, make_batches(architecture, t)) for t, e in enumerate(experts)]
    live = merge(base, experts, grams=grams, task_weights="energy")
    states = merge(base.state_dict(), [e.state_dict() for e in experts], grams=grams, task_weights="energy")
    written = merge(base_path, paths, grams=grams, task_weights="energy", output=tmp_path / "out")
    loaded = type(base).from_pretrained(written.path).state_dict()
    assert len(live.modules) == len(states.modules) == len(written.modules)
    assert set(live.tensors) == set(states.tensors) == set(loaded)
    for name, tensor in loaded.items():
        assert torch.equal(live.tensors[name], tensor), name
        assert torch.equal(states.tensors[name], tensor), name


def test_one_expert_at_zero_ridge_and_equal_experts():
    base = make_base("bert")
    expert = fine_tune(base, 1)
    # More rows than features, so that every Gram has full rank; the pooler sees one row a sequence, so it is left out.
    grams = collect_grams(expert, make_batches("bert", 1, 20), modules=["*layer*"])
    for experts in ([expert], [expert] * 3):
        result = merge(base, experts, grams=[grams] * len(experts), alpha=1e-9, anchor="task_arithmetic")
        for record in result.modules:
            name = f"{record.module}.weight"
            assert relative_error(result.tensors[name], expert.state_dict()[name].double()) < 1e-5, name


@pytest.mark.parametrize("anchor", ["average", "task_arithmetic", "ties", "iso_c"])
def test_infinite_ridge_is_the_anchor_and_a_huge_one_nearly(anchor):
    base = make_base("gpt2")
    experts = [fine_tune(base, seed) for seed in (1, 2)]
    exact = merge(base, experts, anchor=anchor, alpha=math.inf)
    assert exact.modules == []
    near = merge(base, experts, anchor=anchor, alpha=1e9)
    assert len(near.modules) == 8
    for name, tensor in exact.tensors.items():
        torch.testing.assert_close(near.tensors[name], tensor, rtol=1e-6, atol=1e-6)


def test_output_does_not_depend_on_threads_shards_slabs_or_batches(tmp_path, monkeypatch):
    base, experts, base_path, paths = family("llama", tmp_path)
    grams = [
        collect_grams(e, make_batches("llama", t)).save(tmp_path / f"{t}.safetensors") for t, e in enumerate(experts)
    ]

    def run(**options):
        tensors = merge(base_path, paths, grams=grams, anchor="ties", task_weights="energy", **options).tensors
        return {name: tensor.clone() for name, tensor in tensors.items()}

    first = run()
    variants = []
    torch.set_num_threads(1)
    variants.append(run())
    monkeypatch.setattr("bmm_engine.merging.stream.SLAB_ELEMENTS", 37)
    variants.append(run())
    monkeypatch.setitem(BATCH_BYTES, "cpu", 10_000)
    variants.append(run())
    sharded = [
        save(type(base).from_pretrained(p), tmp_path / f"sharded-{p.name}", max_shard_size="20KB")
        for p in (base_path, *paths)
    ]
    variants.append(merge(sharded[0], sharded[1:], grams=grams, anchor="ties", task_weights="energy").tensors)
    for other in variants:
        assert set(other) == set(first)
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_files_of_a_merge(tmp_path):
    base, _, base_path, paths = family("llama", tmp_path)
    (base_path / "tokenizer.json").write_text("{}")
    result = merge(base_path, paths, output=tmp_path / "out", max_shard_size="8KB", dtype="bfloat16")
    names = {p.name for p in result.path.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "bmm_merge.json",
        "model.safetensors.index.json",
    } <= names
    assert len([n for n in names if n.endswith(".safetensors")]) > 1
    record = json.loads((result.path / "bmm_merge.json").read_text())
    assert [i["role"] for i in record["inputs"]] == ["base", "expert 1", "expert 2"]
    assert all(len(f["sha256"]) == 64 for i in record["inputs"] for f in i["files"].values())
    assert record["recipe"]["anchor"] == {"name": "average"}
    assert record["modules"]["solved_modules"] == 14
    config = json.loads((result.path / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    loaded = type(base).from_pretrained(result.path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in json.loads((result.path / "model.safetensors.index.json").read_text())["weight_map"]


def test_bfloat16_checkpoints_are_computed_in_float32_and_rounded_once(tmp_path):
    base = make_base("bert").bfloat16()
    experts = [fine_tune(base, seed) for seed in (1, 2)]
    paths = [save(m, tmp_path / str(i)) for i, m in enumerate([base, *experts])]
    result = merge(paths[0], paths[1:], alpha=math.inf)
    for name, tensor in result.tensors.items():
        if tensor.is_floating_point():
            truth = (experts[0].state_dict()[name].double() + experts[1].state_dict()[name].double()) / 2
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, truth.to(torch.bfloat16)), name


def test_base_without_the_experts_prefix_and_heads_left_out(tmp_path):
    """The usual case: a bare encoder as the base, classifiers as experts, each with a head of its own size."""
    import transformers

    base, experts, _, paths = family("bert", tmp_path)
    bare = save(base.bert, tmp_path / "bare")
    grams = [collect_grams(e, make_batches("bert", t)) for t, e in enumerate(experts)]
    result = merge(bare, paths, grams=grams, output=tmp_path / "out")
    whole = merge(base, experts, grams=grams)
    encoder = transformers.BertModel.from_pretrained(result.path).state_dict()
    assert len(result.modules) == 13
    for name, tensor in encoder.items():
        assert torch.equal(tensor, whole.tensors[f"bert.{name}"]), name
    assert result.summary()["left_out_of_experts"][str(paths[0])] == ["classifier.bias", "classifier.weight"]


def test_old_layernorm_names(tmp_path):
    base = make_base("bert")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in base.state_dict().items()
    }
    assert old.keys() != base.state_dict().keys()
    experts = [fine_tune(base, s).state_dict() for s in (1, 2)]
    result = merge(old, experts, alpha=math.inf)
    assert set(result.tensors) == set(old)


def test_modules_and_keep_base(tmp_path):
    base, experts, base_path, paths = family("bert", tmp_path)
    result = merge(base_path, paths, modules=["*attention.self*"], keep_base=["classifier.*", "bert.embeddings.*"])
    assert len(result.modules) == 6
    state = base.state_dict()
    for name in ("classifier.weight", "bert.embeddings.word_embeddings.weight"):
        assert torch.equal(result.tensors[name], state[name])
    average = (
        experts[0].state_dict()["bert.pooler.dense.weight"] + experts[1].state_dict()["bert.pooler.dense.weight"]
    ) / 2
    torch.testing.assert_close(result.tensors["bert.pooler.dense.weight"], average)


@pytest.mark.parametrize("pattern", ["*attention.query", "*q_proj"], ids=["name in the file", "live name"])
def test_patterns_know_a_module_by_both_its_names(pattern, tmp_path):
    """transformers 5 loads a ViT's `attention.attention.query` as `attention.q_proj`."""
    base, experts, base_path, paths = family("vit", tmp_path)
    if not collect_grams(base, make_batches("vit", 1)).aliases:
        pytest.skip("this transformers has one name for both")
    grams = [collect_grams(e, make_batches("vit", 1), modules=[pattern]) for e in experts]
    result = merge(base_path, paths, grams=grams, modules=[pattern])
    assert len(result.modules) == 2
    assert len(merge(base, experts, grams=grams, modules=[pattern]).modules) == 2


def test_an_unknown_architecture_merges_by_patterns_or_grams(tmp_path):
    _, experts, base_path, paths = family("bert", tmp_path)
    grams = [collect_grams(e, make_batches("bert", t)) for t, e in enumerate(experts)]
    known = merge(base_path, paths, grams=grams).tensors
    for path in (base_path, *paths):
        (path / "config.json").write_text(json.dumps({"model_type": "mystery", "architectures": ["MysteryModel"]}))
    with pytest.raises(CheckpointError, match=r"Give the linear modules in the recipe"):
        merge(base_path, paths)
    assert len(merge(base_path, paths, modules=["*attention.self*"]).modules) == 6
    by_grams = merge(base_path, paths, grams=grams).tensors
    assert all(torch.equal(by_grams[name], tensor) for name, tensor in known.items())


def test_importing_bmm_engine_is_light():
    code = (
        "import time, torch\nstart = time.perf_counter(); import bmm_engine; took = time.perf_counter() - start\n"
        "import sys; heavy = [m for m in ('transformers', 'pydantic', 'typer', 'rich', 'nevergrad', 'huggingface_hub') if m in sys.modules]\n"
        "print(took, heavy); assert not heavy and took < 0.3"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_public_names_all_resolve():
    import bmm_engine

    for name in bmm_engine.__all__:
        assert getattr(bmm_engine, name) is not None
    assert callable(bmm_engine.merge)
    with pytest.raises(AttributeError, match="no attribute 'mergee'"):
        _ = bmm_engine.mergee

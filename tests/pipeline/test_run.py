from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from bmm_engine import FisherSet, collect_fisher, collect_grams, collect_sequential, merge, merge_sequential
from bmm_engine.checkpoint import Checkpoint
from bmm_engine.errors import CheckpointError, ConfigError, GramMismatchError
from bmm_engine.pipeline.measure import collect_from_checkpoint
from bmm_engine.pipeline.models import open_models
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.pipeline.statistics import with_output_weights
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.sections import CalibrationRecipe
from bmm_engine.statistics.calibration import read_calibration
from bmm_engine.statistics.grams import GramSet
from tests.numerics import relative_error
from tests.tiny import family, make_base, make_batches, save


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "vit", "llama"])
def test_collecting_from_a_checkpoint_equals_collecting_from_the_model(architecture, tmp_path):
    _, experts, _, paths = family(architecture, tmp_path)
    batches = make_batches(architecture, 4)
    inputs = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    save_file(inputs, tmp_path / "inputs.safetensors")
    data = read_calibration(tmp_path / "inputs.safetensors")
    grams = collect_from_checkpoint(str(paths[0]), data, CalibrationRecipe(batch_size=4))
    live = collect_grams(experts[0], batches)
    assert grams.modules == live.modules
    assert grams.fingerprints == live.fingerprints
    assert grams.aliases == live.aliases
    for module in live.modules:
        torch.testing.assert_close(grams.get(module).total, live.get(module).total, rtol=1e-5, atol=1e-5)


def test_a_folder_of_images_goes_through_the_checkpoints_own_processor(tmp_path):
    from PIL import Image

    _, experts, _, paths = family("vit", tmp_path / "models")
    settings = {
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
    }
    (paths[0] / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", **settings})
    )
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (50 * i, 255 - 50 * i, 0)).save(folder / f"{i}.png")
    grams = collect_from_checkpoint(str(paths[0]), read_calibration(folder), CalibrationRecipe(batch_size=2))
    colours = (
        torch.tensor([[50 * i, 255 - 50 * i, 0] for i in range(5)]) / 255 * 2 - 1
    )  # what mean and std of a half make of them
    pixels = colours[:, :, None, None].expand(5, 3, 16, 16)
    live = collect_grams(experts[0], [{"pixel_values": pixels}])
    for module in live.modules:
        torch.testing.assert_close(grams.get(module).total, live.get(module).total, rtol=1e-4, atol=1e-4)


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    _, _, base, _ = family("bert", tmp_path)
    (base / "config.json").write_text('{"model_type": "mystery", "architectures": ["MysteryModel"]}')
    save_file({"input_ids": torch.ones(2, 3, dtype=torch.long)}, tmp_path / "inputs.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json.*Give the linear modules"):
        collect_from_checkpoint(str(base), read_calibration(tmp_path / "inputs.safetensors"), CalibrationRecipe())


def save_inputs(architecture, folder, count=2):
    """Each expert's calibration as a file; its batches as the engine will read them."""
    names, batches = [], []
    for t in range(count):
        own = make_batches(architecture, 10 + t)
        save_file({key: torch.cat([b[key] for b in own]) for key in own[0]}, folder / f"inputs-{t}.safetensors")
        names.append(f"inputs-{t}.safetensors")
        batches.append(own)
    return names, batches


def make_recipe(tmp_path, own, **keys):
    """A recipe over `base` and the two experts; `own`: key of an expert -> its two values."""
    experts = [
        {"model": str(tmp_path / f"expert-{t}"), **{key: str(tmp_path / values[t]) for key, values in own.items()}}
        for t in range(2)
    ]
    raw = {"base": str(tmp_path / "base"), "experts": experts, "calibration": {"batch_size": 4}, **keys}
    return Recipe.parse(raw, write_to=[tmp_path])


def test_regmean_plusplus_in_a_recipe(tmp_path):
    base, experts, _, _ = family("bert", tmp_path)
    names, batches = save_inputs("bert", tmp_path)
    own = {"calibration": names, "grams": ["g0.safetensors", "g1.safetensors"]}
    made = make_recipe(tmp_path, own, anchor={"name": "regmean_plusplus", "shrink": 0.8}, alpha=float("inf"))
    lines = []
    result = run_recipe(made, tmp_path / "out", report=lines.append)
    assert lines == [f"expert-{t}: Grams of 13 modules collected while merging" for t in range(2)]
    sets = collect_sequential(base, experts, batches, shrink=0.8)
    truth = merge(
        base, experts, anchor="regmean_plusplus", anchor_parameters={"shrink": 0.8}, grams=sets, alpha=float("inf")
    )
    merged = type(base).from_pretrained(result.path).state_dict()
    for name, tensor in truth.tensors.items():
        assert relative_error(merged[name], tensor.double()) < 1e-5, name
    # The files are used again, by this rule with these parameters only.
    run_recipe(made, tmp_path / "again", report=lines.append)
    assert lines[2:] == [f"expert-{t}: Grams from {tmp_path / f'g{t}.safetensors'}" for t in range(2)]
    other = make_recipe(tmp_path, own, anchor={"name": "regmean_plusplus", "shrink": 0.5}, alpha=float("inf"))
    with pytest.raises(GramMismatchError, match="but the merge is regmean_plusplus with"):
        run_recipe(other, tmp_path / "no")
    with pytest.raises(GramMismatchError, match=r"of the kind 'sequential'.*Collect plain ones"):
        run_recipe(make_recipe(tmp_path, own, anchor="regmean", alpha=float("inf")), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_fisher_in_a_recipe(tmp_path):
    base, experts, _, _ = family("bert", tmp_path)
    names, batches = save_inputs("bert", tmp_path)
    own = {"calibration": names, "fisher": ["f0.safetensors", "f1.safetensors"]}
    result = run_recipe(make_recipe(tmp_path, own, anchor="fisher", alpha=float("inf")), tmp_path / "out")
    fishers = [collect_fisher(e, b) for e, b in zip(experts, batches)]
    truth = merge(base, experts, anchor="fisher", fishers=fishers, alpha=float("inf")).tensors
    merged = type(base).from_pretrained(result.path).state_dict()
    for name, tensor in truth.items():
        if tensor.is_floating_point():
            assert relative_error(merged[name], tensor.double()) < 1e-4, name
    assert FisherSet.load(tmp_path / "f0.safetensors").examples == fishers[0].examples
    with pytest.raises(GramMismatchError, match="list such files in the order"):
        merge(base, experts, anchor="fisher", fishers=fishers[::-1], alpha=float("inf"))
    with pytest.raises(ConfigError, match="0 given for 2 experts"):
        merge(base, experts, anchor="fisher", alpha=float("inf"))


def test_fisher_information_by_the_labels_of_the_data(tmp_path):
    """Of files that hold `labels`; a text says no class."""
    _, experts, _, _ = family("bert", tmp_path)
    names, batches = save_inputs("bert", tmp_path)
    labelled = [[{**b, "labels": (b["input_ids"][:, 0] + t) % 3} for b in own] for t, own in enumerate(batches)]
    for name, own in zip(names, labelled):
        save_file({key: torch.cat([b[key] for b in own]) for key in own[0]}, tmp_path / name)
    calibration = {"batch_size": 4, "fisher_labels": "data"}
    own = {"calibration": names, "fisher": ["f0.safetensors", "f1.safetensors"]}
    run_recipe(make_recipe(tmp_path, own, anchor="epimer", alpha=math.inf, calibration=calibration), tmp_path / "out")
    for t, (expert, given) in enumerate(zip(experts, labelled)):
        found, truth = FisherSet.load(tmp_path / f"f{t}.safetensors"), collect_fisher(expert, given, labels="data")
        name = next(n for n in truth.tensors if "dense.weight" in n)
        assert found.labels == "data"
        assert relative_error(found.get(name), truth.get(name).double()) < 1e-5
    bare = make_recipe(
        tmp_path,
        {"calibration": save_inputs("bert", tmp_path)[0]},
        anchor="fisher",
        alpha=math.inf,
        calibration=calibration,
    )
    with pytest.raises(ConfigError, match="needs `labels` in each batch"):
        run_recipe(bare, tmp_path / "bare")


def test_rules_on_grams_need_measured_ones(tmp_path):
    base, experts, _, _ = family("bert", tmp_path)
    with pytest.raises(ConfigError, match="anchor 'regmean' needs measured Grams: give `calibration`"):
        merge(base, experts, anchor="regmean", alpha=float("inf"))
    plain = [collect_grams(e, make_batches("bert", t)) for t, e in enumerate(experts)]
    with pytest.raises(GramMismatchError, match=r"of the kind 'expert', regmean_plusplus needs 'sequential'"):
        merge(base, experts, anchor="regmean_plusplus", grams=plain, alpha=float("inf"))


def write_adapter(folder, base, seed):
    """A LoRA adapter in PEFT's format on the attention of tiny BERT, and what it adds."""
    generator = torch.Generator().manual_seed(seed)
    tensors, added = {}, {}
    for name, tensor in base.state_dict().items():
        if name.endswith(("query.weight", "value.weight")):
            a = torch.randn(3, tensor.shape[1], generator=generator)
            b = torch.randn(tensor.shape[0], 3, generator=generator) * 0.05
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            added[name] = 2.0 * b.double() @ a.double()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["query", "value"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


@pytest.mark.parametrize("anchor", ["average", "tsv_m", "knots", "ties", "dc_merge", "core_space"])
def test_adapters_as_experts_equal_full_models(anchor, tmp_path):
    # In float64: in float32 a full model's task vector has no exact rank, and TSV-M keeps the directions of its rounding errors.
    base = make_base("bert").double()
    base_path = save(base, tmp_path / "base")
    full = []
    for t in range(2):
        added = write_adapter(tmp_path / f"lora-{t}", base, t)
        full.append({n: w + added[n] if n in added else w.clone() for n, w in base.state_dict().items()})
    paths = [str(tmp_path / f"lora-{t}") for t in range(2)]
    options = {"anchor": anchor, "modules": ["*query", "*value"]}
    for alpha in (float("inf"), 0.1):
        low = merge(str(base_path), paths, alpha=alpha, **options).tensors
        dense = merge(base.state_dict(), full, alpha=alpha, **options).tensors
        for name, tensor in dense.items():
            assert relative_error(low[name], tensor.double()) < 2e-5, (alpha, name)


def test_calibration_of_an_adapter_runs_the_adapted_model(tmp_path):
    base, _, _, _ = family("bert", tmp_path)
    names, batches = save_inputs("bert", tmp_path)
    added = write_adapter(tmp_path / "lora-0", base, 5)
    raw = {
        "base": str(tmp_path / "base"),
        "experts": [
            {
                "model": str(tmp_path / "lora-0"),
                "calibration": str(tmp_path / names[0]),
                "grams": str(tmp_path / "g.safetensors"),
            }
        ],
        "calibration": {"batch_size": 4},
        "alpha": 0.01,
    }
    result = run_recipe(Recipe.parse(raw, write_to=[tmp_path]), tmp_path / "out")
    with torch.no_grad():
        for name, delta in added.items():
            base.get_parameter(name).add_(delta.float())
    live, found = collect_grams(base, batches[0]), GramSet.load(tmp_path / "g.safetensors")
    module = "bert.encoder.layer.1.output.dense"
    torch.testing.assert_close(found.get(module).total, live.get(module).total, rtol=1e-4, atol=1e-4)
    record = json.loads((result.path / "bmm_merge.json").read_text())
    assert record["inputs"][1]["adapter_of"] == str(tmp_path / "base")
    assert set(record["inputs"][1]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_what_a_recipe_leaves_open_follows_from_what_it_has(tmp_path):
    """Calibration for every expert: the walk; classifiers, or encoders with heads: weighted outputs."""
    base, experts, base_path, paths = family("bert", tmp_path)
    for t in range(2):
        save_file(
            {k: torch.cat([b[k] for b in make_batches("bert", 10 + t)]) for k in ("input_ids", "attention_mask")},
            tmp_path / f"data-{t}.safetensors",
        )
    full = [
        {"model": str(path), "calibration": str(tmp_path / f"data-{t}.safetensors")} for t, path in enumerate(paths)
    ]

    def parsed(experts=full, **keys):
        return Recipe.parse({"base": str(base_path), "experts": experts, **keys})

    def weights(recipe):
        lines = []
        chosen = with_output_weights(recipe, open_models(recipe), lines.append).output_weights
        return chosen, "".join(lines)

    assert parsed().mode == "sequential"
    assert parsed().task_weights == "energy"
    assert weights(parsed()) == ("sensitivity", "output_weights: sensitivity, since every expert is a classifier")
    bare = [{"model": e["model"]} for e in full]
    measured = [{**e, "grams": "g.safetensors"} for e in full]
    for other in (
        {"experts": bare},
        {"experts": measured},
        {"gram_source": "data"},
        {"mode": "plain"},
        {"alpha": math.inf},
    ):
        assert parsed(**other).mode == "plain"
    assert weights(parsed(alpha=math.inf)) == ("none", "")
    assert weights(parsed(experts=bare)) == ("task_vectors", "")
    assert weights(parsed(output_weights="none")) == ("none", "")

    encoders = []
    for t in range(2):
        experts[t].bert.save_pretrained(tmp_path / f"encoder-{t}")
        save_file(dict(experts[t].classifier.state_dict()), tmp_path / f"head-{t}.safetensors")
        encoders.append({**full[t], "model": str(tmp_path / f"encoder-{t}")})
    base.bert.save_pretrained(tmp_path / "encoder")
    recipe = {"base": str(tmp_path / "encoder"), "experts": encoders}
    assert weights(Recipe.parse(recipe)) == (
        "none",
        "output_weights: none, since encoder-0 is no classifier and has no head",
    )
    headed = [{**e, "head": str(tmp_path / f"head-{t}.safetensors")} for t, e in enumerate(encoders)]
    assert weights(Recipe.parse({**recipe, "experts": headed}))[0] == "sensitivity"

    lines = []
    result = run_recipe(parsed(), tmp_path / "merged", report=lines.append, progress=False)
    record = json.loads((result.path / "bmm_merge.json").read_text())["recipe"]
    assert record["mode"] == "sequential"
    assert record["output_weights"] == "sensitivity"
    assert any("output_weights: sensitivity" in line for line in lines)


@pytest.mark.parametrize(
    ("keys", "given"),
    [
        ({}, {}),
        ({"gram_source": "data", "fit_bias": True, "task_weights": "energy", "scale": 1.1}, {"grams": True}),
        ({"hybrid_share": 0.3, "anchor": {"name": "ties", "density": 0.4}, "alpha": 0.2}, {"grams": True}),
        (
            {"mode": "sequential", "sequential": {"norms": "fit"}, "alpha": [{"filter": "mlp", "value": 1.0}]},
            {"batches": True},
        ),
    ],
    ids=["data-free", "data", "hybrid", "sequential"],
)
def test_a_recipe_and_keywords_give_the_same_bytes(keys, given, tmp_path):
    _, experts, _, paths = family("gpt2", tmp_path)
    names, batches = save_inputs("gpt2", tmp_path)
    own = {"calibration": names} if given else {}
    made = make_recipe(tmp_path, own, output_weights="none", **({"mode": "plain"} if given else {}) | keys)
    run_recipe(made, tmp_path / "of-recipe")
    settings = {
        k: v for k, v in keys.items() if k not in ("mode", "sequential", "gram_source", "hybrid_share", "anchor")
    }
    settings |= keys.get("sequential", {})
    if "anchor" in keys:
        settings |= {"anchor": "ties", "anchor_parameters": {"density": 0.4}}
    models = (tmp_path / "base", paths)
    if "batches" in given:
        merge_sequential(*models, batches, output=tmp_path / "of-keywords", **settings)
    else:
        grams = [collect_grams(e, b) for e, b in zip(experts, batches)] if given else "task_vectors"
        hybrid = keys.get("hybrid_share")
        merge(*models, grams=grams, hybrid=hybrid, output=tmp_path / "of-keywords", **settings)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("of-recipe", "of-keywords"))
    assert one == other


def test_each_checkpoint_is_opened_once(tmp_path, monkeypatch):
    from bmm_engine.checkpoint.reader import Checkpoint

    family("bert", tmp_path)
    names, _ = save_inputs("bert", tmp_path)
    opened, open_one = [], Checkpoint.open.__func__

    def counting(cls, path, **options):
        opened.append(str(path))
        return open_one(cls, path, **options)

    monkeypatch.setattr(Checkpoint, "open", classmethod(counting))
    run_recipe(make_recipe(tmp_path, {"calibration": names}), tmp_path / "out")
    models = [str(tmp_path / name) for name in ("base", "expert-0", "expert-1")]
    assert sorted(path for path in opened if path in models) == models


@pytest.mark.parametrize("mode", [None, "plain"])
def test_calibration_of_a_model_without_linear_modules_is_refused_and_the_advice_merges_it(mode, tmp_path):
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    paths = []
    for i in range(3):
        torch.manual_seed(i)
        model = MobileNetV1ForImageClassification(MobileNetV1Config(depth_multiplier=0.05, image_size=32))
        model.save_pretrained(paths.append(tmp_path / f"model-{i}") or paths[-1])
    save_file({"pixel_values": torch.randn(2, 3, 32, 32)}, tmp_path / "inputs.safetensors")
    experts = [{"model": str(p), "calibration": str(tmp_path / "inputs.safetensors")} for p in paths[1:]]
    raw = {"base": str(paths[0]), "mode": mode, "experts": experts}
    with pytest.raises(
        ConfigError, match=r"model-0: MobileNetV1ForImageClassification has no linear modules.*alpha: inf"
    ):
        run_recipe(Recipe.parse(raw), tmp_path / "out", progress=False)
    result = run_recipe(Recipe.parse({**raw, "alpha": "inf"}), tmp_path / "out", progress=False)
    name = "mobilenet_v1.conv_stem.convolution.weight"
    own = [Checkpoint.open(p).load(name).double() for p in paths[1:]]
    assert not result.modules
    assert relative_error(Checkpoint.open(tmp_path / "out").load(name), sum(own) / 2) < 1e-6

"""Each bad input is a typed error that names the tensor or file, both values and the remedy, and leaves nothing on disk."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from bmm_engine import GramAccumulator, collect_grams, merge, plan_merge
from bmm_engine.checkpoint import StateDictSource
from bmm_engine.errors import (
    CheckpointError,
    ConfigError,
    GramMismatchError,
    MissingTensorError,
    NonFiniteWeightError,
    OutputExistsError,
    OutputWriteError,
    ShapeMismatchError,
)
from tests.tiny import family, fine_tune, make_base, make_batches

QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture
def models(tmp_path):
    _, experts, base, paths = family("bert", tmp_path / "models")
    return experts, base, paths


def edit(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def refused(tmp_path, error, words, *args, **options):
    """The merge raises, and there is nothing where it would have written."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    with pytest.raises(error, match=words):
        merge(*args, output=folder / "out", **options)
    assert list(folder.iterdir()) == []


def test_missing_tensor_in_one_expert(models, tmp_path):
    _, base, paths = models
    edit(paths[1], lambda t: t.pop(f"{QUERY}.bias"))
    refused(tmp_path, MissingTensorError, rf"expert-1 .*{QUERY}\.bias.*base", base, paths)


def test_missing_head_suggests_to_keep_the_bases(models, tmp_path):
    _, base, paths = models
    edit(paths[1], lambda t: [t.pop("classifier.weight"), t.pop("classifier.bias")])
    refused(tmp_path, MissingTensorError, r"keep_base: \['classifier\.\*'\]", base, paths)


def test_unrelated_model(models, tmp_path):
    _, base, _ = models
    _, _, other, _ = family("gpt2", tmp_path / "gpt2")
    refused(tmp_path, MissingTensorError, "shares no tensor", base, [other])


def test_shape_mismatch(models, tmp_path):
    _, base, paths = models
    edit(paths[0], lambda t: t.update({f"{QUERY}.weight": torch.zeros(16, 8)}))
    refused(tmp_path, ShapeMismatchError, rf"{QUERY}\.weight: shape \(16, 16\).*\(16, 8\)", base, paths)


def test_quantised_expert(models, tmp_path):
    _, base, paths = models
    edit(paths[0], lambda t: t.update({f"{QUERY}.weight": torch.zeros(16, 16, dtype=torch.int8)}))
    refused(tmp_path, ShapeMismatchError, rf"{QUERY}\.weight: torch\.float32.*torch\.int8.*Quantised", base, paths)


@pytest.mark.parametrize("name", [f"{QUERY}.weight", "bert.embeddings.word_embeddings.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_a_weight(models, tmp_path, name, value):
    _, base, paths = models
    edit(paths[1], lambda t: t[name].view(-1)[3:5].fill_(value))
    refused(tmp_path, NonFiniteWeightError, rf"expert-1.*{name}.*2 of", base, paths)


def test_gram_of_the_wrong_size(models, tmp_path):
    experts, base, paths = models
    grams = [collect_grams(e, make_batches("bert", 1)) for e in experts]
    grams[1].grams[QUERY] = GramAccumulator(15, name=QUERY).update(torch.randn(4, 15))
    refused(tmp_path, GramMismatchError, rf"{QUERY}.* width 15, the module reads 16", base, paths, grams=grams)


def test_gram_of_another_model(models, tmp_path):
    experts, base, paths = models
    grams = [
        collect_grams(e, make_batches("bert", 1)).save(tmp_path / f"{i}.safetensors") for i, e in enumerate(experts)
    ]
    refused(
        tmp_path,
        GramMismatchError,
        r"1\.safetensors: measured on another model than .*expert-0.*hash",
        base,
        paths,
        grams=grams[::-1],
    )


def test_gram_of_another_model_that_differs_only_in_a_late_module(models, tmp_path):
    experts, base, paths = models
    grams = [collect_grams(e, make_batches("bert", 1)) for e in experts]
    edit(paths[0], lambda t: t["bert.pooler.dense.weight"].add_(1))
    refused(tmp_path, GramMismatchError, "bert.pooler.dense", base, paths, grams=grams)


def test_gram_of_another_architecture(models, tmp_path):
    _, base, paths = models
    grams = collect_grams(make_base("gpt2"), make_batches("gpt2", 1))
    refused(tmp_path, GramMismatchError, "no Gram for module 'bert.*transformer.h.0", base, paths, grams=[grams, grams])


def test_asked_for_module_without_a_gram(models, tmp_path):
    experts, base, paths = models
    grams = [collect_grams(e, make_batches("bert", 1), modules=["*query"]) for e in experts]
    result = merge(base, paths, grams=grams)
    assert len(result.modules) == 2
    assert len(result.plan.unmeasured) == 11
    refused(tmp_path, GramMismatchError, "no Gram for module", base, paths, grams=grams, modules=["*query", "*key"])


def test_too_few_grams_and_no_experts(models, tmp_path):
    experts, base, paths = models
    grams = [collect_grams(experts[0], make_batches("bert", 1))]
    refused(tmp_path, ConfigError, "1 Gram sets for 2 experts", base, paths, grams=grams)
    with pytest.raises(ConfigError, match="no experts"):
        merge(base, [])


def test_truncated_checkpoint(models, tmp_path):
    _, base, paths = models
    file = paths[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path, CheckpointError, r"expert-1.model\.safetensors", base, paths)


def test_index_that_leads_outside(models, tmp_path):
    _, base, paths = models
    names = list(load_file(paths[1] / "model.safetensors"))
    (paths[1] / "model.safetensors").rename(tmp_path / "models" / "stolen.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../stolen.safetensors")}
    (paths[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, CheckpointError, r"\.\./stolen\.safetensors", base, paths)


def test_output_that_is_not_ours(models, tmp_path):
    _, base, paths = models
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="mine"):
            merge(base, paths, output=mine, overwrite=overwrite)
    assert [p.name for p in tmp_path.joinpath("mine").iterdir()] == ["thesis.tex"]
    done = merge(base, paths, output=tmp_path / "out").path
    with pytest.raises(OutputExistsError, match="overwrite"):
        merge(base, paths, output=done)
    merge(base, paths, output=done, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "models", "out"}


def test_full_disk(models, tmp_path, monkeypatch):
    import os

    _, base, paths = models
    real, calls = os.pwrite, []

    def pwrite(descriptor, data, offset):
        calls.append(offset)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    refused(tmp_path, OutputWriteError, "out", base, paths)
    assert len(calls) > 20


def test_dtype_that_cannot_hold_the_result(models, tmp_path):
    _, base, paths = models
    for path in paths:
        edit(path, lambda t: t["bert.embeddings.LayerNorm.bias"].fill_(1e30))
    refused(tmp_path, NonFiniteWeightError, r"LayerNorm\.bias.*float16", base, paths, dtype="float16")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"anchor": "averge"}, "did you mean 'average'"),
        ({"anchor_parameters": {"wieght": [1, 2]}}, "did you mean 'weight'"),
        ({"anchor_parameters": {"weight": [1, 2, 3]}}, "3 values for 2 experts"),
        ({"alpha": [0.1, -1]}, "alpha = -1: it must be >= 0"),
        ({"scale": math.inf}, "scale = inf: it must be finite"),
        ({"anchor": "slerp"}, "merges exactly 1 experts beside the base, not 2"),
        ({"grams": "data"}, "'task_vectors' or a list"),
        ({"hybrid": 0.5}, "give the Grams too"),
        ({"fit_bias": True}, "gram_source 'data'"),
        ({"task_weights": [1.0]}, "1 numbers for 2 experts"),
        ({"task_weights": "energetic"}, "'energetic'"),
        ({"alpha": -1.0}, "alpha = .*: it must be >= 0"),
        ({"scale": math.nan}, "scale = nan: it must be finite"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"modules": ["*quary*"]}, r"'\*quary\*' matches no linear module"),
        ({"keep_base": ["clasifier.*"]}, r"'clasifier\.\*' matches no tensor"),
        ({"normalization": "l2"}, "'l2'"),
        ({"max_shard_size": "5 apples"}, "5 apples"),
    ],
)
def test_bad_options(models, tmp_path, options, words):
    _, base, paths = models
    refused(tmp_path, ConfigError, words, base, paths, **options)


def test_state_dicts_need_modules_or_grams():
    base = make_base("bert")
    states = [fine_tune(base, s).state_dict() for s in (1, 2)]
    with pytest.raises(ConfigError, match="Name them with `modules`"):
        merge(base.state_dict(), states)
    assert len(merge(base.state_dict(), states, modules=["*attention.self*"]).modules) == 6


def test_experts_that_are_called_alike_are_told_apart(tmp_path):
    """By their numbers, in errors and records; one model given twice keeps its name."""
    experts = [StateDictSource(fine_tune(make_base("bert"), seed).state_dict(), "mine") for seed in (1, 2)]
    base = make_base("bert")
    plan = plan_merge(base, [*experts, experts[0]])
    assert [expert.label for expert in plan.alignment.experts] == [f"mine (expert {t})" for t in range(3)]
    assert [expert.label for expert in experts] == ["mine", "mine"]
    broken = fine_tune(make_base("bert"), 3).state_dict()
    broken[f"{QUERY}.weight"] = broken[f"{QUERY}.weight"] * math.nan
    with pytest.raises(NonFiniteWeightError, match=r"mine \(expert 1\), tensor"):
        merge(base, [experts[0], StateDictSource(broken, "mine")])
    _, _, saved, paths = family("bert", tmp_path / "models")
    plan = plan_merge(saved, [paths[0], paths[0], paths[1]])
    assert [expert.label for expert in plan.alignment.experts] == [str(paths[i]) for i in (0, 0, 1)]

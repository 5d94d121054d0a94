"""What was measured is checked against the expert that it is given for: names, shapes, and the hashes of the weights."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bmm_engine as bmm
from bmm_engine.cli import app
from bmm_engine.errors import ConfigError, GramMismatchError, MissingTensorError, ShapeMismatchError
from bmm_engine.pipeline.run import prepare_recipe
from bmm_engine.recipe.recipe import Recipe
from tests.tiny import family, fine_tune, make_base, make_batches, save


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Base and two experts on disk, and what was measured on each: name -> one file for each expert."""
    folder = tmp_path_factory.mktemp("bert")
    _, experts, base, paths = family("bert", folder)
    files = {"grams": [], "fishers": [], "sensitivities": []}
    for t, expert in enumerate(experts):
        batches = make_batches("bert", t)
        sets = {
            "grams": bmm.collect_grams(expert, batches),
            "fishers": bmm.collect_fisher(expert, batches, examples=2),
            "sensitivities": bmm.collect_sensitivity(expert, batches),
        }
        for kind, own in sets.items():
            files[kind].append(own.save(folder / f"{kind}-{t}.safetensors"))
    return base, paths, files, folder


def other_model(kind, files, folder):
    """A set of another architecture for expert 2."""
    model, batches = make_base("gpt2"), make_batches("gpt2", 1)
    measure = {
        "grams": bmm.collect_grams,
        "fishers": partial(bmm.collect_fisher, examples=2, labels="sampled"),
        "sensitivities": bmm.collect_sensitivity,
    }
    found = measure[kind](model, batches)
    return [files[kind][0], found.save(folder / f"{kind}-of-gpt2.safetensors")]


def options(kind, given, files):
    """Keywords of a merge that needs sets of that kind."""
    if kind == "fishers":
        return {"anchor": "fisher", "alpha": math.inf, "fishers": given}
    return {"grams": given} if kind == "grams" else {"grams": files["grams"], "sensitivities": given}


KINDS = {"grams": GramMismatchError, "fishers": MissingTensorError, "sensitivities": MissingTensorError}


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_of_another_model_for_one_expert_is_refused_when_the_plan_is_made(bert, kind):
    base, paths, files, folder = bert
    given = other_model(kind, files, folder)
    with pytest.raises(KINDS[kind], match=rf"{kind}-of-gpt2\.safetensors: holds no .*such as transformer\.h\.0"):
        bmm.plan_merge(base, paths, **options(kind, given, files))


@pytest.mark.parametrize("kind", KINDS)
def test_sets_in_another_order_are_refused_with_the_guess(bert, kind):
    base, paths, files, _ = bert
    with pytest.raises(
        GramMismatchError, match=rf"{kind}-1.*measured on another model than .*expert-0.*fits .*expert-1"
    ):
        bmm.merge(base, paths, **options(kind, files[kind][::-1], files))


def without_fingerprints(path, target):
    with safe_open(path, framework="pt") as file:
        ((name, text),) = file.metadata().items()
    save_file(load_file(path), target, {name: json.dumps({**json.loads(text), "fingerprints": {}})})
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_fingerprints_asks_for_a_flag(bert, kind, tmp_path):
    base, paths, files, _ = bert
    bare = [files[kind][0], without_fingerprints(files[kind][1], tmp_path / "bare.safetensors")]
    with pytest.raises(GramMismatchError, match=r"bare\.safetensors: does not say .*unchecked_statistics: true"):
        bmm.plan_merge(base, paths, **options(kind, bare, files))
    taken = bmm.merge(base, paths, **options(kind, bare, files), unchecked_statistics=True).tensors
    whole = bmm.merge(base, paths, **options(kind, files[kind], files)).tensors
    assert all(torch.equal(taken[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("kind", ["fishers", "sensitivities"])
def test_a_set_of_other_shapes_is_refused_when_the_plan_is_made(bert, kind, tmp_path):
    base, paths, files, _ = bert
    with safe_open(files[kind][1], framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(files[kind][1])
    name = next(n for n in tensors if n.endswith("layer.1.attention.self.query" + ".weight" * (kind == "fishers")))
    tensors[name] = torch.ones(15, 15)
    save_file(tensors, tmp_path / "cut.safetensors", metadata)
    given = [files[kind][0], tmp_path / "cut.safetensors"]
    with pytest.raises(ShapeMismatchError, match=r"cut\.safetensors: .*\(15, 15\).*16"):
        bmm.plan_merge(base, paths, **options(kind, given, files))


def test_sets_of_unequal_modules_are_refused_unless_asked_for(bert, tmp_path):
    base, paths, files, _ = bert
    expert = fine_tune(make_base("bert"), 2)
    part = bmm.collect_grams(expert, make_batches("bert", 1), modules=["*query"]).save(tmp_path / "part.safetensors")
    given = [files["grams"][0], part]
    with pytest.raises(
        GramMismatchError, match=r"part\.safetensors: holds no Gram for 11 modules.*it holds 2 of the 13"
    ):
        bmm.plan_merge(base, paths, grams=given)
    for chosen in ({"modules": ["*query"]}, {"unchecked_statistics": True}):
        assert bmm.plan_merge(base, paths, grams=given, **chosen).module_count == 2


def test_sets_that_share_no_module_solve_nothing(bert):
    base, paths, _, _ = bert
    experts = [fine_tune(make_base("bert"), t + 1) for t in range(2)]
    given = [
        bmm.collect_grams(expert, make_batches("bert", t), modules=[name])
        for t, (expert, name) in enumerate(zip(experts, ["*query", "*key"], strict=True))
    ]
    with pytest.raises(GramMismatchError, match="nothing can be solved"):
        bmm.plan_merge(base, paths, grams=given, unchecked_statistics=True)


def test_grams_of_another_model_for_state_dicts(bert):
    experts = [fine_tune(make_base("bert"), t + 1) for t in range(2)]
    other = bmm.collect_grams(make_base("gpt2"), make_batches("gpt2", 1))
    own = bmm.collect_grams(experts[0], make_batches("bert", 1))
    states = [e.state_dict() for e in experts]
    for given in ([other, other], [own, other], [other, own]):
        with pytest.raises(GramMismatchError, match="holds no Gram for module"):
            bmm.plan_merge(make_base("bert").state_dict(), states, grams=given)


def test_a_merge_that_is_to_solve_and_has_nothing_to_solve(bert):
    base, paths, _, _ = bert
    with pytest.raises(ConfigError, match=r"nothing can be solved.*`modules`.*keep_base.*alpha: inf"):
        bmm.plan_merge(base, paths, keep_base=["*.weight"])
    assert bmm.plan_merge(base, paths, keep_base=["*.weight"], alpha=math.inf).groups == ()
    assert bmm.plan_merge(base, paths, alpha=[{"filter": "bert", "value": math.inf}]).groups == ()


def test_a_network_of_convolutions_has_nothing_to_solve_and_is_merged(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    torch.manual_seed(0)
    base = transformers.ResNetForImageClassification(config)
    paths = [
        save(model, tmp_path / f"model-{i}") for i, model in enumerate((base, fine_tune(base, 1), fine_tune(base, 2)))
    ]
    assert bmm.plan_merge(paths[0], paths[1:]).groups == ()
    assert bmm.plan_merge(base, paths[1:]).groups == ()


def write_recipe(folder, base, paths, grams, **keys):
    experts = [{"model": str(m), "grams": str(g)} for m, g in zip(paths, grams, strict=True)]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": str(base), "experts": experts, **keys}))
    return path


def test_the_command_refuses_and_takes_a_flag(bert, tmp_path):
    from typer.testing import CliRunner

    base, paths, files, folder = bert
    recipe = write_recipe(tmp_path, base, paths, other_model("grams", files, folder))
    found = CliRunner().invoke(app, ["merge", str(recipe), "-o", str(tmp_path / "out")])
    assert isinstance(found.exception, GramMismatchError)
    assert not (tmp_path / "out").exists()
    bare = [without_fingerprints(f, tmp_path / f"bare-{t}.safetensors") for t, f in enumerate(files["grams"])]
    recipe = write_recipe(tmp_path, base, paths, bare)
    arguments = ["merge", str(recipe), "-o", str(tmp_path / "out")]
    assert isinstance(CliRunner().invoke(app, arguments).exception, GramMismatchError)
    assert CliRunner().invoke(app, [*arguments, "--unchecked-statistics"]).exit_code == 0
    record = json.loads((tmp_path / "out" / "bmm_merge.json").read_text())
    assert record["recipe"]["unchecked_statistics"] is True


def test_a_file_of_another_model_is_found_before_the_others_are_measured(bert, tmp_path, monkeypatch):
    base, paths, files, folder = bert
    monkeypatch.setattr("bmm_engine.pipeline.statistics.collect_from_checkpoint", lambda *_, **__: pytest.fail("ran"))
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    recipe = write_recipe(tmp_path, base, paths, [tmp_path / "new.safetensors", other_model("grams", files, folder)[1]])
    raw = yaml.safe_load(recipe.read_text())
    raw["experts"][0]["calibration"] = "texts.txt"
    recipe.write_text(yaml.safe_dump(raw))
    with pytest.raises(GramMismatchError, match="grams-of-gpt2"):
        prepare_recipe(Recipe.load(recipe))

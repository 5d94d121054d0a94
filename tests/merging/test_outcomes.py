"""What became of every tensor of every input, and a warning where much of what could be solved was not."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
import transformers

import bmm_engine as bmm
from bmm_engine.cli import main
from bmm_engine.merging.outcomes import outcomes, told, totals
from tests.odd import changed, in_layout, people, tensors
from tests.tiny import fine_tune, make_batches, save


def test_every_tensor_of_every_input_has_one_reason(tmp_path):
    _, experts, path, paths = people("bert", tmp_path)
    changed(path, lambda held: held.update({"bert.embeddings.position_ids": torch.arange(32)[None]}))
    changed(
        paths[0],
        lambda held: held.update(
            {"own_head.weight": torch.ones(3, 3), "bert.embeddings.position_ids": torch.arange(32)[None]}
        ),
    )
    live = in_layout(paths[1], experts[1], "_orig_mod.")
    plan = bmm.plan_merge(path, [paths[0], live], keep_base=["classifier.*"])
    found = outcomes(plan.alignment, plan.solved)
    for own, label in ((path, str(path)), (paths[0], str(paths[0])), (live, str(live))):
        names = [name for part in found[label].values() for name in part]
        assert sorted(names) == sorted(tensors(own))
    counts = {label: {reason: len(names) for reason, names in own.items()} for label, own in found.items()}
    assert counts[str(path)] == {"solved": 13, "rule": 26, "base": 2, "buffer": 1}
    assert counts[str(paths[0])] == {"solved": 13, "rule": 26, "base": 2, "buffer": 1, "left out": 1}
    assert counts[str(live)] == {"solved": 13, "rule": 26, "base": 2}
    assert "1 left out (own_head.weight)" in told(totals(found)[str(paths[0])])


def test_ties_and_copies(tmp_path):
    _, _, path, paths = people("gemma2", tmp_path)
    changed(paths[1], lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    result = bmm.merge(path, [*paths, paths[1]], output=tmp_path / "out")
    found = json.loads((result.path / "bmm_merge.json").read_text())["modules"]["tensors"]
    tied = {"tensors": 1, "first": ["lm_head.weight"]}
    assert [own["tied"] for own in found.values()] == [tied] * 4
    assert list(found) == [*map(str, (path, *paths)), f"{paths[1]} (again)"]
    assert found[str(path)]["solved"]["tensors"] == 14


def test_the_command_and_inspect_say_it(tmp_path, monkeypatch, capsys):
    _, _, path, paths = people("bert", tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        f"base: {path}\nexperts: [{paths[0]}, {paths[1]}]\nkeep_base: ['classifier.*']\n"
    )
    monkeypatch.setenv("COLUMNS", "300")
    for command in (["merge", "-o", str(tmp_path / "out")], ["inspect"]):
        monkeypatch.setattr(sys, "argv", ["bmm", command[0], str(tmp_path / "recipe.yaml"), *command[1:]])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        said = capsys.readouterr().out
        for own in (path, *paths):
            assert f"{own}: 13 solved, 26 rule, 2 base (classifier.bias, classifier.weight)" in said


def test_much_that_is_not_solved_is_a_warning(tmp_path, caplog):
    _, experts, path, paths = people("bert", tmp_path)
    grams = [bmm.collect_grams(m, make_batches("bert", i), modules=["*query"]) for i, m in enumerate(experts)]
    result = bmm.merge(path, paths, grams=grams)
    assert "10 of 12 linear weights, 89% of their elements, are not solved" in caplog.text
    assert result.summary()["notes"] == list(result.plan.notes)
    caplog.clear()
    for options in ({"modules": ["*query"]}, {"alpha": math.inf}):
        assert bmm.merge(path, paths, grams=grams, **options).plan.notes == ()
    assert bmm.merge(path, paths).plan.notes == ()
    assert caplog.text == ""


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "t5", "bart", "wav2vec2", "segformer", "llava"])
def test_nothing_to_warn_of(family, tmp_path):
    _, _, path, paths = people(family, tmp_path)
    plan = bmm.plan_merge(path, paths)
    assert plan.notes == ()
    assert not any(plan.alignment.expert_only.values())


def test_stacked_experts_are_said(tmp_path):
    config = transformers.MixtralConfig(
        num_hidden_layers=1, hidden_size=16, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, num_local_experts=2,
    )  # fmt: skip
    base = transformers.MixtralForCausalLM(config)
    paths = [save(fine_tune(base, s), tmp_path / str(s)) for s in (1, 2)]
    (note,) = bmm.plan_merge(save(base, tmp_path / "base"), paths).notes
    assert "6 of 10 linear weights, 80% of their elements" in note
    assert "block_sparse_moe.experts.0.w1.weight" in note


def test_layers_that_only_an_expert_has_are_said(tmp_path):
    _, _, path, paths = people("llama", tmp_path)
    changed(
        paths[0],
        lambda held: held.update(
            {n.replace(".1.", ".2."): t.clone() for n, t in list(held.items()) if ".layers.1." in n}
        ),
    )
    (note,) = bmm.plan_merge(path, paths).notes
    assert f"{paths[0]}: 9 tensors inside its layers are left out" in note
    assert "model.layers.2." in note

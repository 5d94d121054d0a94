"""What an error recommends is done to the letter, and the merge is then right: exit 0, and the values of float64."""

from __future__ import annotations

import math
import re
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bmm_engine.cli import main
from tests.odd import changed, in_layout, mean, people, tensors


@pytest.fixture
def brought(tmp_path, monkeypatch, capsys):
    """Merges by the command: `(exit code, all that it prints as one line)`."""
    monkeypatch.delenv("BMM_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "400")

    def merge(path, paths, **keys):
        keys = {"base": str(path), "experts": [{"model": str(p)} for p in paths], "alpha": math.inf, **keys}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(keys))
        monkeypatch.setattr(sys, "argv", ["bmm", "merge", str(recipe), "-o", str(tmp_path / "out"), "--overwrite"])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, " ".join((printed.out + printed.err).split())

    return merge


def right(tmp_path, *models, but=(), atol=4e-7):
    """The output is the mean of the models, in float64, but for some of its tensors."""
    found = tensors(tmp_path / "out")
    for name in found.keys() - set(but):
        if found[name].is_floating_point():
            torch.testing.assert_close(found[name].double(), mean(name, *models), rtol=0, atol=atol)
    return found


def kept(output):
    """The `keep_base` that a message recommends."""
    return yaml.safe_load(re.search(r"keep_base: (\[.*?\])", output)[1])


def test_a_head_that_no_expert_has(brought, tmp_path):
    _, _, path, paths = people("bert", tmp_path)
    for p in paths:
        changed(p, lambda held: [held.pop(n) for n in list(held) if n.startswith("classifier")])
    code, said = brought(path, paths)
    assert code == 2
    assert "'classifier.bias' (and 1 more)" in said
    assert "It is a head that no expert has trained" in said
    assert kept(said) == ["classifier.*"]
    code, said = brought(path, paths, keep_base=kept(said))
    assert code == 0, said
    heads = ("classifier.weight", "classifier.bias")
    found = right(tmp_path, *map(tensors, paths), but=heads)
    assert all(torch.equal(found[n], tensors(path)[n]) for n in heads)


def test_a_head_that_is_the_bases_in_the_other_experts(brought, tmp_path):
    _, _, path, paths = people("bert", tmp_path)
    heads = ("classifier.weight", "classifier.bias")
    changed(paths[0], lambda held: [held.pop(n) for n in heads])
    changed(paths[1], lambda held: held.update({n: tensors(path)[n] for n in heads}))
    code, said = brought(path, paths)
    assert (code, kept(said)) == (2, ["classifier.*"])
    assert brought(path, paths, keep_base=kept(said))[0] == 0
    assert torch.equal(tensors(tmp_path / "out")[heads[0]], tensors(path)[heads[0]])


def test_a_head_that_another_expert_has_trained_is_not_given_away(brought, tmp_path):
    _, experts, path, paths = people("bert", tmp_path)
    bare = changed(
        shutil.copytree(paths[0], tmp_path / "bare"),
        lambda held: [held.pop(n) for n in list(held) if n.startswith("classifier")],
    )
    code, said = brought(path, [bare, paths[1]])
    assert code == 2
    assert f"It is a head, which {paths[1]} trained" in said
    assert "Save the expert with its head" in said
    experts[0].save_pretrained(tmp_path / "whole")
    assert brought(path, [tmp_path / "whole", paths[1]])[0] == 0
    right(tmp_path, *map(tensors, paths))


def test_heads_of_other_tasks(brought, tmp_path):
    _, _, path, paths = people("bert", tmp_path)
    changed(
        paths[1], lambda held: held.update({"classifier.weight": torch.randn(5, 16), "classifier.bias": torch.randn(5)})
    )
    code, said = brought(path, paths)
    assert code == 2
    assert "heads of different tasks cannot be one" in said
    assert "each expert's own stays in its files" in said
    assert brought(path, paths, keep_base=kept(said))[0] == 0
    heads = ("classifier.weight", "classifier.bias")
    right(tmp_path, *map(tensors, paths), but=heads)


def test_a_tensor_of_another_size_is_never_kept(brought, tmp_path):
    _, _, path, paths = people("llama", tmp_path)
    changed(paths[1], lambda held: held.update({"model.layers.0.mlp.up_proj.weight": torch.randn(48, 16)}))
    code, said = brought(path, paths)
    assert code == 2
    assert "of another size than the base" in said
    assert "keep_base" not in said


def test_fewer_layers(brought, tmp_path):
    _, _, path, paths = people("llama", tmp_path)
    changed(paths[1], lambda held: [held.pop(n) for n in list(held) if ".layers.1." in n])
    code, said = brought(path, paths, unchecked_configs=True)
    assert code == 2
    assert "It lacks whole layers: model.layers.1; it has 1 of them" in said
    assert "keep_base" not in said


def test_an_incomplete_expert(brought, tmp_path):
    _, experts, path, paths = people("llama", tmp_path)
    changed(paths[1], lambda held: held.pop("model.layers.1.mlp.up_proj.weight"))
    code, said = brought(path, paths)
    assert code == 2
    assert "The expert is incomplete" in said
    assert "keep_base" not in said
    experts[1].save_pretrained(paths[1])
    assert brought(path, paths)[0] == 0
    right(tmp_path, *map(tensors, paths))


def test_a_bare_file_that_may_be_tied(brought, tmp_path):
    _, _, path, paths = people("untied llama", tmp_path)
    head = "lm_head.weight"
    bare = tmp_path / "bare.safetensors"
    save_file({n: t for n, t in tensors(paths[0]).items() if n != head}, bare, {"format": "pt"})
    code, said = brought(path, [bare, paths[1]])
    assert code == 2
    assert "It may be tied to 'model.embed_tokens.weight'" in said
    assert "keep_base" not in said
    # If it is: as a folder whose config says so.
    folder = tmp_path / "tied"
    folder.mkdir()
    shutil.copy(bare, folder / "model.safetensors")
    shutil.copy(paths[0] / "config.json", folder)
    assert "tie_word_embeddings: true" in said
    changed(folder, tie_word_embeddings=True)
    assert brought(path, [folder, paths[1]])[0] == 0
    tied = tensors(folder)
    right(tmp_path, tied | {head: tied["model.embed_tokens.weight"]}, tensors(paths[1]))
    # If not: the whole model.
    assert brought(path, [paths[0] / "model.safetensors", paths[1]])[0] == 0
    right(tmp_path, *map(tensors, paths))


def test_a_config_that_contradicts_its_files_about_the_head(brought, tmp_path):
    _, experts, path, paths = people("llama", tmp_path)
    changed(paths[1], tie_word_embeddings=False)
    code, said = brought(path, paths)
    assert code == 2
    assert "correct that key" in said
    changed(paths[1], tie_word_embeddings=True)
    assert brought(path, paths)[0] == 0
    right(tmp_path, *map(tensors, paths))
    experts[1].config.tie_word_embeddings = False
    experts[1].lm_head.weight = torch.nn.Parameter(torch.randn(60, 16))
    experts[1].save_pretrained(paths[1])  # or its head was missing
    assert brought(path, paths)[0] == 0
    first, second = map(tensors, paths)
    right(tmp_path, first | {"lm_head.weight": first["model.embed_tokens.weight"]}, second)


def test_renamed_tensors(brought, tmp_path):
    _, experts, path, paths = people("bert", tmp_path)
    own = shutil.copytree(paths[0], tmp_path / "renamed")
    changed(own, lambda held: held.update({n.replace("query", "wq"): held.pop(n) for n in list(held) if "query" in n}))
    code, said = brought(path, [own, paths[1]])
    assert code == 2
    assert "of the same shape, which the base lacks" in said
    assert "save it again (from_pretrained, then save_pretrained)" in said
    assert "keep_base" not in said
    experts[0].save_pretrained(own)
    assert brought(path, [own, paths[1]])[0] == 0
    right(tmp_path, *map(tensors, paths))


def test_what_the_config_has_no_place_for(brought, tmp_path):
    _, _, path, paths = people("bert", tmp_path)
    changed(path, architectures=["BertModel"])
    code, said = brought(path, paths)
    assert code == 2
    assert "would lose them" in said
    assert "keep_base" not in said
    assert "Correct the config (its `architectures`" in said
    changed(path, architectures=["BertForSequenceClassification"])
    assert brought(path, paths)[0] == 0
    right(tmp_path, *map(tensors, paths))
    changed(path, architectures=["BertModel"])
    assert "unchecked_configs: true" in said
    assert brought(path, paths, unchecked_configs=True)[0] == 0
    right(tmp_path, *map(tensors, paths))


def test_wrapped_and_live_checkpoints_by_the_command(brought, tmp_path):
    base, experts, path, paths = people("vit", tmp_path)
    code, said = brought(
        in_layout(path, base, "_orig_mod."), [in_layout(paths[0], experts[0], "live"), paths[1]], alpha=0.1
    )
    assert code == 0, said
    assert "12 modules solved, 28 tensors from the anchor" in said

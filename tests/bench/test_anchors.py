"""`python -m bench anchors`: whole merges by child processes, gated on the formula and on the rival's result."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from bench import anchors, formulas, processes
from bench.__main__ import main
from bmm_engine.anchors import get_anchor

TINY = anchors.Shape(layers=2, hidden=64, intermediate=160, vocabulary=300, key_value=32, heads=4)

# Knows what mergekit's `linear` knows, by its command line. SCALE: of the weights; another than 1 is another merge.
RIVAL = """#!{python}
import sys
if sys.argv[1] == "-c":
    print("9.9")
    sys.exit()
import torch, yaml
from pathlib import Path
from safetensors.torch import load_file, save_file
module, config, output, *options = sys.argv[2:]
assert module == "mergekit.scripts.run_yaml" and options == ["--no-copy-tokenizer"]
config = yaml.safe_load(Path(config).read_text())
assert config["merge_method"] == "linear" and config["dtype"] == "bfloat16"
models = [load_file(Path(m["model"]) / "model.safetensors") for m in config["models"]]
weights = [m["parameters"]["weight"] for m in config["models"]]
weights = [w + {shift} * (w == max(weights)) for w in weights]
Path(output).mkdir()
merged = {{n: sum(w * m[n].float() for w, m in zip(weights, models)) / sum(weights) for n in models[0]}}
save_file({{n: t.bfloat16() for n, t in merged.items()}}, Path(output) / "model.safetensors")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def rival(tmp_path):
    def make(shift: float = 0.0, rounds: int | None = None) -> anchors.Rival:
        script = tmp_path / f"python-{shift}"
        script.write_text(RIVAL.format(python=sys.executable, shift=shift))
        script.chmod(0o755)
        return anchors.Rival(str(script), rounds)

    return make


@pytest.mark.slow
def test_the_command_measures_a_merge_and_keeps_only_the_checkpoints(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(anchors, "Shape", lambda layers=28: replace(TINY, layers=layers))
    file = tmp_path / "rows.json"
    arguments = ["anchors", "--rules", "linear", "--layers", "2", "--rounds", "2", "--dir", str(folder)]
    assert main([*arguments, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert (row["op"], row["rival"], row["ratio"], row["rival_mib"]) == ("anchors", "-", None, None)
    assert row["shape"] == "average, 0.106 M, 2 layers, base + 4"
    assert row["ours_ms"] > 100  # an interpreter and torch
    assert 50 < row["private_mib"] < row["peak_mib"]
    assert 0 < row["error"] < 0.1
    (shaped,) = folder.iterdir()
    assert sorted(path.name for path in shaped.iterdir()) == ["base", *(f"expert-{i}" for i in range(1, 5))]
    assert "making" in capsys.readouterr().err
    anchors.Models(folder, TINY)
    assert not capsys.readouterr().err  # made once


@pytest.mark.slow
def test_a_rival_takes_turns_with_us(folder, rival):
    (row,) = anchors.measure("linear", anchors.Models(folder, TINY), 2, rival(rounds=1))
    assert row.rival == "mergekit 9.9 linear"
    assert row.shape.endswith("base + 4, rival run 1 of 2 times")
    assert row.ratio == pytest.approx(row.rival_ms / row.ours_ms)
    assert row.rival_spread is None
    assert row.rival_error == pytest.approx(row.error, rel=0.01)
    assert row.rival_mib > 50


@pytest.mark.slow
def test_a_rival_that_merges_otherwise_is_not_timed(folder, rival):
    with pytest.raises(AssertionError, match=r"rival, tensor 'model.embed_tokens.weight': .* away from the formula"):
        anchors.measure("linear", anchors.Models(folder, TINY), 1, rival(shift=0.2))


def test_an_interpreter_without_mergekit_is_named(tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(AssertionError, match=r"python has no mergekit; name one that has by --rival-python"):
        anchors.Rival(str(script)).version()


@pytest.mark.parametrize("name", anchors.RULES)
def test_the_anchors_of_the_table_are_ours(name):
    for ours in anchors.RULES[name].ours.values():
        parameters = dict(ours.anchor)
        get_anchor(parameters.pop("name")).parameters(parameters)


def test_the_gate_tells_the_rule_from_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    base = torch.empty(200, 300).normal_(0, 0.02, generator=generator).bfloat16().double()
    taus = [torch.empty(200, 300).normal_(0, 0.002, generator=generator) for _ in range(4)]
    experts = [(base + tau).bfloat16().double() for tau in taus]
    truth = formulas.ties(0.2)(base, experts)
    assert 0.9 < truth.decided.double().mean() < 1
    right = truth.merged.bfloat16().double()
    anchors._error(right, truth, base, 1.0, "ours")
    anchors._error(torch.where(truth.decided, right, 0.0), truth, base, 1.0, "ours")  # what is undecided does not count
    for other in (formulas.ties(0.22)(base, experts), formulas.ties(0.2, [0.002] * 4)(base, experts)):
        with pytest.raises(AssertionError, match=r"ours: .* away from the formula"):
            anchors._error(other.merged.bfloat16().double(), truth, base, anchors.RIVAL_ROUNDINGS, "ours")


def test_draws_of_a_random_rule_are_alike_and_of_another_density_are_not():
    generator = torch.Generator().manual_seed(0)

    def change(density: float) -> torch.Tensor:
        kept = torch.rand(40_000, generator=generator) < density
        return kept / density * torch.empty(40_000).normal_(generator=generator)

    anchors._assert_alike(change(0.5), change(0.5), "w")
    with pytest.raises(AssertionError, match="tensor 'w': norm of the change"):
        anchors._assert_alike(change(0.5), change(0.55), "w")


def test_a_child_is_measured_without_the_memory_of_its_parent(tmp_path):
    held = torch.ones(100 * 2**20 // 4)
    usage = processes.run([sys.executable, "-S", "-c", "x = bytearray(20 * 2**20)"], tmp_path / "log")
    assert held.nbytes / 2**20 == 100
    assert 20 < usage.peak_mib < 60
    with pytest.raises(AssertionError, match=r"ended with status 3:\nlast words"):
        processes.run([sys.executable, "-S", "-c", "print('last words'); raise SystemExit(3)"], tmp_path / "log")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gram", "--layers", "2"], "--layers is for the bench `anchors`"),
        (["anchors", "--rival-rounds", "1"], "--rival-rounds needs --rival"),
        (["anchors", "--layers", "0"], "--layers 0: at least 1"),
        (["anchors", "--rules", "linear,tise"], "no rule 'tise'; there are linear"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err

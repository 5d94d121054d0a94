"""What an anchor reads beside the weights depends on its parameters: a recipe measures that and nothing else, and it reaches the rule."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from bmm_engine import (
    collect_fisher,
    collect_grams,
    collect_sensitivity,
    get_anchor,
    merge,
    merge_sequential,
    plan_merge,
    search,
)
from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.merging.merge import merge_models
from bmm_engine.merging.sources import Models
from bmm_engine.pipeline.run import prepare_recipe, run_recipe
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.sequential.state import Sweep
from bmm_engine.statistics.sensitivity import SensitivitySet
from tests.numerics import relative_error
from tests.pipeline.test_run import make_recipe, save_inputs
from tests.tiny import family

KFAC = {"name": "epimer", "metric": "kfac", "rank": 2}
PARAMETERS = {"metric": "kfac", "rank": 2}


class Measured:
    """A base and two experts, as live models and as files, and what recipes would measure on them."""

    def __init__(self, folder, architecture="gpt2"):
        self.base, self.experts, _, self.paths = family(architecture, folder)
        names, self.batches = save_inputs(architecture, folder)
        self.own = {"calibration": names}
        both = list(zip(self.experts, self.batches))
        self.grams = [collect_grams(e, b) for e, b in both]
        self.sensitivities = [collect_sensitivity(e, b) for e, b in both]
        self.fishers = [collect_fisher(e, b, labels="sampled") for e, b in both]

    def merge(self, parameters, **given):
        return merge(self.base, self.experts, anchor="epimer", anchor_parameters=parameters, alpha=math.inf, **given)


@pytest.fixture
def models(tmp_path):
    return Measured(tmp_path)


def record_of(result):
    return json.loads((result.path / "bmm_merge.json").read_text())["modules"]


def test_a_recipe_measures_what_the_metric_needs(models, tmp_path):
    whole = {"grams": models.grams, "sensitivities": models.sensitivities, "fishers": models.fishers}
    for metric, needs in (("kfac", {"grams", "sensitivities"}), ("fisher", {"fishers"}), ("identity", set())):
        parameters = {"metric": metric, "rank": 2}
        made = make_recipe(
            tmp_path,
            models.own,
            anchor={"name": "epimer", **parameters},
            alpha=math.inf,
            calibration={"batch_size": 4, "fisher_labels": "sampled"},
        )
        lines = []
        result = run_recipe(made, tmp_path / metric, report=lines.append)
        assert len(lines) == 2 * len(needs), lines
        truth = models.merge(parameters, **{need: whole[need] for need in needs})
        found = load_file(result.path / "model.safetensors")
        assert all(torch.equal(found[name], truth.tensors[name]) for name in found), metric
        assert record_of(result)["diagnostics"] == truth.diagnostics
        shares = {own["share"] for own in truth.diagnostics.values()}
        assert max(shares) < 1e-12 if metric == "identity" else 0.001 < min(shares) <= max(shares) < 1


def test_the_rule_gets_them_as_the_module_is_oriented(models):
    """GPT-2 keeps its weights (in, out), and so its Fisher information; Grams and sensitivities are of inputs and outputs."""
    name, module = "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc"
    base, *experts = (m.state_dict()[name].mT.contiguous() for m in (models.base, *models.experts))
    direct = {
        "fisher": {"fishers": [own.get(name).mT for own in models.fishers]},
        "kfac": {
            "grams": [own.get(module).total / own.get(module).rows for own in models.grams],
            "sensitivities": [own.get(module) for own in models.sensitivities],
        },
    }
    for metric, given in direct.items():
        truth = get_anchor("epimer")(base, experts, metric=metric, rank=2, **given)
        merged = models.merge({"metric": metric, "rank": 2}, **{need: getattr(models, need) for need in given})
        assert relative_error(merged.tensors[name].mT, truth.double()) < 1e-5


def test_a_metric_may_differ_between_modules(models):
    by_module = {"metric": [{"filter": "mlp", "value": "kfac"}, {"value": "identity"}], "rank": 2}
    measured = {"grams": models.grams, "sensitivities": models.sensitivities}
    mixed = models.merge(by_module, **measured)
    of_kfac, plain = models.merge(PARAMETERS, **measured), models.merge({"metric": "identity", "rank": 2})
    for name in ("transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"):
        assert torch.equal(mixed.tensors[name], (of_kfac if "mlp" in name else plain).tensors[name])
    assert not torch.equal(of_kfac.tensors[name], plain.tensors[name])


def test_sensitivities_of_the_anchor_alone_weigh_no_errors(models, tmp_path):
    """`output_weights` says whether the solve weighs outputs; the anchor has its sensitivities in either case."""
    made = make_recipe(tmp_path, models.own, anchor=KFAC, mode="plain", output_weights="none")
    prepared = prepare_recipe(made)
    assert [len(prepared.statistics.sensitivities), len(prepared.statistics.anchor_sensitivities)] == [0, 2]
    alone = prepared.merge().tensors
    weighed = prepare_recipe(made.model_copy(update={"output_weights": "sensitivity"}))
    assert [len(weighed.statistics.sensitivities), len(weighed.statistics.anchor_sensitivities)] == [2, 0]
    name = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(alone[name], weighed.merge().tensors[name])
    # Without an anchor that reads them they change nothing at all.
    averaged = prepared.settings.but(anchor="average", anchor_parameters={})
    opened = Models.open(tmp_path / "base", models.paths)
    truth = merge(tmp_path / "base", models.paths, grams=models.grams, hybrid=0.5).tensors
    found = merge_models(averaged, opened, prepared.statistics).tensors
    assert all(torch.equal(found[n], truth[n]) for n in truth)


def test_a_walk_has_the_anchors_record_also_after_it_was_stopped(models, tmp_path, monkeypatch):
    options = {"anchor": "epimer", "anchor_parameters": PARAMETERS, "grams": models.grams}
    given = (tmp_path / "base", models.paths, models.batches)
    truth = models.merge(PARAMETERS, grams=models.grams, sensitivities=models.sensitivities).diagnostics
    whole = merge_sequential(*given, sensitivities=models.sensitivities, **options)
    assert whole.diagnostics == truth
    own = {**models.own, "grams": ["g0", "g1"]}
    for t, grams in enumerate(models.grams):
        grams.save(tmp_path / f"g{t}")
    made = make_recipe(tmp_path, own, anchor=KFAC, mode="sequential", output_weights="none")

    def stopped(self, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "publish", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(made, tmp_path / "walked")
    assert (tmp_path / "walked.walk" / "anchor" / "diagnostics.json").exists()
    result = run_recipe(made, tmp_path / "walked")
    assert not (tmp_path / "walked.walk").exists()
    assert record_of(result)["diagnostics"] == truth
    name = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(load_file(result.path / "model.safetensors")[name], whole.tensors[name]), "not weighed"


def test_what_is_lacking_or_another_models(models, tmp_path):
    with pytest.raises(ConfigError, match="has no `sensitivity`, which anchor 'epimer' needs"):
        Recipe.parse({"base": "b", "experts": [{"model": "m", "grams": "g"}], "anchor": KFAC, "alpha": "inf"})
    Recipe.parse({"base": "b", "experts": [{"model": "m", "grams": "g"}], "anchor": {**KFAC, "metric": "gram"}})
    with pytest.raises(
        ConfigError, match=r"needs the sensitivities of every expert: 0 given for 2 experts.*--sensitivity"
    ):
        models.merge(PARAMETERS, grams=models.grams)
    with pytest.raises(ConfigError, match="needs the Fisher information of every expert: 0 given"):
        models.merge({})
    with pytest.raises(ConfigError, match="needs measured Grams"):
        models.merge(PARAMETERS, sensitivities=models.sensitivities)
    first = models.sensitivities[0]
    cut = SensitivitySet({name: own[:3, :3] for name, own in first.tensors.items()}, fingerprints=first.fingerprints)
    own = {**models.own, "sensitivity": ["s0", "s1"]}
    cut.save(tmp_path / "s0")
    with pytest.raises(ShapeMismatchError, match="has shape \\(3, 3\\)"):
        run_recipe(make_recipe(tmp_path, own, anchor=KFAC, alpha=math.inf), tmp_path / "out")
    assert not (tmp_path / "s1").exists(), "found before anything was measured"
    options = {"anchor": "epimer", "anchor_parameters": PARAMETERS, "alpha": math.inf, "grams": models.grams}
    with pytest.raises(ShapeMismatchError, match="has shape \\(3, 3\\)"):
        plan_merge(models.base, models.experts, sensitivities=[cut, cut], **options)


def test_a_search_of_the_mode_plain_has_sensitivities_for_anchors_alone(models):
    def score(model, task):
        return float(model.transformer.h[0].mlp.c_fc.weight.norm())

    given = {"grams": models.grams, "sensitivities": models.sensitivities, "trials": 1, "groups": "all"}
    found = search(models.base, models.experts, score, anchor="epimer", anchor_parameters=PARAMETERS, **given)
    truth = models.merge(PARAMETERS, grams=models.grams, sensitivities=models.sensitivities).tensors
    name = "transformer.h.0.mlp.c_fc.weight"
    assert found.candidate.anchor == "epimer"
    assert all(alpha == math.inf for alpha in found.candidate.alpha.values())
    assert torch.equal(found.tensors[name], truth[name])
    with pytest.raises(ConfigError, match="a search in the mode plain weighs all outputs alike"):
        search(models.base, models.experts, score, anchor="epimer", anchor_parameters={"metric": "gram"}, **given)

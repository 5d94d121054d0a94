"""NaN and infinity under every rule: the error names the tensor and the model, as listed."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

import bmm_engine as bmm
from bmm_engine.errors import NonFiniteWeightError
from tests.odd import changed, people

NAMES = ("bert.encoder.layer.1.attention.self.query.weight", "bert.encoder.layer.1.output.dense.bias",
         "bert.embeddings.word_embeddings.weight")  # fmt: skip
RULES = [name for name, rule in bmm.registered_anchors().items() if not rule.needs]
QUICK = {"wudi": {"steps": 2}, "doge_ta": {"steps": 2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    _, _, path, paths = people("bert", tmp_path_factory.mktemp("models"))
    return [path, *paths]


def spoilt(models, who, name, value, tmp_path):
    folder = shutil.copytree(models[who], tmp_path / f"spoilt-{who}")

    def put(held):
        held[name].view(-1)[5] = value

    return [changed(folder, put) if t == who else model for t, model in enumerate(models)]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_names_tensor_and_model(models, rule, tmp_path):
    count = min(bmm.get_anchor(rule).experts[1] or 2, 2)
    for who, name, value in ((0, NAMES[0], math.nan), (count, NAMES[1], -math.inf), (count, NAMES[2], math.nan)):
        if rule == "average" and who == 0:  # the base does not count there
            continue
        given = spoilt(models, who, name, value, tmp_path / name)
        with pytest.raises(NonFiniteWeightError, match=rf"spoilt-{who}.*{name}.*1 of \d+ values are NaN or infinite"):
            bmm.merge(
                given[0], given[1 : 1 + count], anchor=rule, alpha=math.inf, anchor_parameters=QUICK.get(rule, {})
            )


def test_the_expert_is_named_by_its_label_in_the_order_listed(models, tmp_path):
    given = spoilt(models, 2, NAMES[2], math.nan, tmp_path)
    for experts in (given[1:], given[:0:-1]):
        with pytest.raises(NonFiniteWeightError, match=r"spoilt-2"):
            bmm.merge(given[0], experts, anchor="ties", alpha=math.inf)


def test_values_that_do_not_fit_are_still_told_as_that(models, tmp_path):
    given = spoilt(models, 1, NAMES[2], 1e30, tmp_path)
    with pytest.raises(NonFiniteWeightError, match=r"do not fit torch\.float16"):
        bmm.merge(given[0], given[1:], alpha=math.inf, dtype=torch.float16)

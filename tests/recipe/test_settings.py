"""One field for each option of the algebra: a key of recipes, a keyword of every merge, a value of records, all with one check."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import yaml

import bmm_engine as bmm
from bmm_engine.errors import ConfigError
from bmm_engine.recipe.keywords import keywords_of, settings_of
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.sections import SequentialRecipe
from bmm_engine.recipe.settings import Algebra, MergeSettings, SequentialOptions

# A value that is not the default, for every option.
OTHER = {
    "gram_source": "data",
    "hybrid_share": 0.25,
    "normalization": "none",
    "alpha": [{"filter": "mlp", "value": 2.0}],
    "filter": "exponential",
    "directions": 0.65,
    "calibrate": "svc",
    "prior": 2.0,
    "scale": 1.5,
    "task_weights": (1.0, 0.5),
    "sensitivity_share": 0.5,
    "output_samples": 4.0,
    "shrinkage": 0.2,
    "fit_bias": True,
    "modules": ["*mlp*"],
    "keep_base": ["head*"],
    "host": 1,
    "vocabulary": "pad",
    "unchecked_statistics": True,
    "unchecked_configs": True,
    "device": "cuda:1",
}


def recipe_of(**keys):
    experts = [{"model": f"expert-{t}", "grams": f"grams-{t}.safetensors"} for t in range(2)]
    return Recipe.parse({"base": "base", "experts": experts, **keys})


@pytest.mark.parametrize("key", Algebra.model_fields)
def test_every_option_is_a_key_a_keyword_and_a_value_of_the_record(key):
    value = OTHER[key]
    plain = list(value) if isinstance(value, tuple) else value
    recipe = recipe_of(**{"gram_source": "data", key: plain})
    assert getattr(recipe.settings, key) == value != getattr(MergeSettings(), key)
    assert yaml.safe_load(yaml.safe_dump(recipe.plain()))[key] == plain
    if key not in ("gram_source", "hybrid_share"):  # those follow from `grams` and `hybrid`
        for mode, function in (("plain", bmm.merge), ("sequential", bmm.merge_sequential)):
            assert key in inspect.signature(function).parameters
            assert f"`{key}`" in function.__doc__
            assert getattr(settings_of(mode, {key: value}, gram_source="data"), key) == value
    if key != "device":
        assert MergeSettings(**{"gram_source": "data", key: value}).plain()[key] == plain


def test_a_record_of_keywords_is_a_recipe_of_the_same_settings():
    settings = settings_of(
        "sequential", {"alpha": math.inf, "anchor": "ties", "sweeps": 2, "hidden_dtype": torch.bfloat16}
    )
    experts = [{"model": f"expert-{t}", "calibration": "texts.txt"} for t in range(2)]
    raw = {"base": "base", "experts": experts, "anchor": "ties", **settings.plain()}
    raw.pop("gram_source")
    found = Recipe.parse(yaml.safe_load(yaml.safe_dump(raw))).settings
    assert (found.alpha, found.sequential.sweeps, found.sequential.hidden_dtype) == (math.inf, 2, torch.bfloat16)
    apart = {"gram_source": None, "sequential": None}
    assert {**found.options(), **apart} == {**settings.options(), **apart}


def test_keywords_of_the_walk_are_keys_of_its_section():
    assert set(keywords_of("sequential")) - set(keywords_of("plain")) == set(SequentialOptions.model_fields)
    assert set(SequentialOptions.model_fields) - set(SequentialRecipe.model_fields) == {"mask", "walk_dtype"}
    assert settings_of("sequential", {"sweeps": 2, "remeasure": print}).plain()["sequential"]["remeasure"] is True


def test_what_a_mode_leaves_open():
    assert (MergeSettings().task_weights, MergeSettings().fit_bias) == ("none", False)
    walk = MergeSettings(mode="sequential")
    assert (walk.task_weights, walk.fit_bias) == ("energy", True)
    assert settings_of("sequential", {"task_weights": None}).task_weights == "none"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aplha": 1}, "unknown key 'aplha'; did you mean 'alpha'"),
        ({"gram_source": "data"}, "unknown key 'gram_source'"),
        ({"alpha": -1}, r"alpha = -1: it must be >= 0 \(inf for the anchor itself\)"),
        ({"alpha": True}, "alpha = True: it must not be true or false"),
        ({"filter": "tikhonov"}, "filter = 'tikhonov': .*'ridge', 'exponential' or 'truncated'"),
        ({"directions": 0}, r"directions = 0: it must be a whole number >= 1, a share \(0 < share <= 1"),
        ({"directions": 1.5}, "directions = 1.5: it must be"),
        ({"directions": "median"}, "directions = 'median': .*'participation' or 'gavish_donoho'"),
        ({"prior": math.inf}, "prior = inf: .*finite"),
        ({"scale": math.nan}, "scale = nan: it must be finite"),
        (
            {"task_weights": "some"},
            "task_weights = 'some': it must be 'none', 'energy', 'frobenius' or one number per expert",
        ),
        ({"sensitivity_share": 1.0}, r"sensitivity_share = 1\.0: .*less than 1"),
        ({"vocabulary": "trim"}, "vocabulary = 'trim': .*'error', 'crop' or 'pad'"),
        ({"normalization": 3}, "normalization = 3"),
        ({"anchor": "averge"}, "averge.*average"),
        ({"anchor": "ties", "anchor_parameters": {"densty": 0.2}}, "densty.*density"),
        ({"fit_bias": True}, "fit_bias needs the mean of the inputs"),
    ],
)
def test_mistakes_name_the_keyword_the_value_and_the_remedy(options, words):
    with pytest.raises(ConfigError, match=words):
        settings_of("plain", options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bmm.merge("base", ["expert"], ouput="merged"), "merge: unknown key 'ouput'; did you mean 'output'"),
        (lambda: bmm.plan_merge("base", ["expert"], aplha=1), "plan_merge: unknown key 'aplha'; did you mean 'alpha'"),
        (lambda: bmm.merge("base", ["expert"], sweeps=2), "merge: unknown key 'sweeps'"),
        (lambda: bmm.merge_sequential("base", ["expert"], [[]], swep=2), "unknown key 'swep'; did you mean 'sweeps'"),
        (
            lambda: bmm.search(torch.nn.Linear(2, 2), ["expert"], len, trails=2),
            "search: unknown key 'trails'; .*'trials'",
        ),
        (
            lambda: bmm.search(torch.nn.Linear(2, 2), ["expert"], len, keep=[]),
            "search: unknown key 'keep'; .*'keep_base'",
        ),
    ],
)
def test_a_keyword_that_nobody_knows_is_an_error_with_a_suggestion(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_settings_stay_as_they_are_and_changes_are_checked():
    settings = MergeSettings(alpha=[{"filter": "mlp", "value": 2}, {"value": 0.5}])
    assert settings.alpha_setting.at("layer.mlp.weight", 0.0, 2) == 2.0
    changed = settings.but(scale=2.0)
    assert (changed.scale, changed.alpha, settings.scale) == (2.0, settings.alpha, 1.0)
    with pytest.raises(ConfigError, match="scale"):
        settings.but(scale=math.inf)
    with pytest.raises(ValueError, match="frozen"):
        settings.scale = 2.0
    alone = MergeSettings(gram_source="data", fit_bias=True, alpha=0.5, scale=2.0).anchor_alone("task_vectors")
    assert (alone.solves, alone.scale, alone.fit_bias, alone.gram_source) == (False, 1.0, False, "task_vectors")

from __future__ import annotations

import math

import pytest
import yaml

from bmm_engine.errors import ConfigError
from bmm_engine.recipe import Recipe

GOOD = {"base": "b", "experts": ["x", "y"]}


def load(tmp_path, recipe, **overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return Recipe.load(path, **overrides)


def test_defaults_and_short_forms(tmp_path):
    recipe = load(tmp_path, {**GOOD, "anchor": "ties", "modules": "*q*"})
    assert [e.model for e in recipe.experts] == ["x", "y"]
    assert recipe.anchor.name == "ties"
    assert recipe.gram_source == "task_vectors"
    assert recipe.modules == ["*q*"]


def test_long_forms_and_inferred_source(tmp_path):
    experts = [{"model": "x", "grams": "x.safetensors"}, {"model": "y", "calibration": "y.txt", "name": "why"}]
    recipe = load(
        tmp_path, {**GOOD, "experts": experts, "anchor": {"name": "ties", "density": 0.3}, "alpha": float("inf")}
    )
    assert recipe.gram_source == "data"
    assert recipe.anchor.parameters == {"density": 0.3}
    assert recipe.alpha == math.inf
    assert recipe.expert_name(1) == "why"


def test_paths_are_relative_to_the_recipe_and_hub_ids_stay(tmp_path):
    (tmp_path / "x").mkdir()
    recipe = load(tmp_path, {"base": "org/name", "experts": [{"model": "x", "grams": "new/g.safetensors"}]})
    assert recipe.base == "org/name"
    assert recipe.experts[0].model == str(tmp_path / "x")
    assert recipe.experts[0].grams == str(tmp_path / "new/g.safetensors")


def test_overrides(tmp_path):
    recipe = load(tmp_path, {**GOOD, "alpha": 1.0}, alpha=0.5, anchor="iso_c", dtype=None)
    assert (recipe.alpha, recipe.anchor.name, recipe.dtype) == (0.5, "iso_c", None)


def test_plain_values_load_again(tmp_path):
    recipe = load(tmp_path, {**GOOD, "alpha": float("inf"), "anchor": {"name": "ties", "density": 0.5}})
    again = Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.plain())))
    assert again == recipe


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({**GOOD, "aplha": 1}, r"unknown key 'aplha'; did you mean 'alpha'"),
        ({**GOOD, "experts": [{"model": "x", "gram": "g"}]}, r"'experts\.0\.gram'; did you mean 'grams'"),
        ({**GOOD, "calibration": {"sample": 3}}, r"'calibration\.sample'; did you mean 'samples'"),
        ({**GOOD, "zzz": 1}, "known keys are base, experts"),
        ({"base": "b"}, "'experts' is missing"),
        ({**GOOD, "experts": []}, "experts"),
        ({**GOOD, "alpha": -1}, "alpha = -1"),
        ({**GOOD, "alpha": "large"}, "alpha = 'large'"),
        ({**GOOD, "gram_source": "dta"}, "gram_source = 'dta'"),
        ({**GOOD, "gram_source": "data"}, "'x' has none"),
        ({**GOOD, "experts": ["x", {"model": "y", "grams": "g"}]}, "'x' has neither"),
        ({**GOOD, "task_weights": "energetic"}, "task_weights"),
        ("- a\n- b\n", "holds a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_name_the_file_the_key_and_the_remedy(tmp_path, recipe, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load(tmp_path, recipe)
    assert "recipe.yaml" in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: the recipe cannot be read"):
        Recipe.load(tmp_path / "none.yaml")

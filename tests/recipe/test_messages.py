"""Whatever stands in a recipe, or in mergekit's file: it loads, or is a `ConfigError` that names the file in at most 1,500 characters."""

from __future__ import annotations

import copy
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bmm_engine.anchors import registered_anchors
from bmm_engine.errors import ConfigError
from bmm_engine.recipe.mergekit.methods import KNOWN, METHODS
from bmm_engine.recipe.recipe import SECTIONS, Recipe
from bmm_engine.recipe.references import ExpertRecipe
from bmm_engine.recipe.yaml_file import dump_yaml

LONG = "x" * 1700
VALUES = st.sampled_from(
    [
        None, True, 0, 1, -1, 2**53, -(2**53), 0.0, 1e308, float("inf"), -float("inf"), float("nan"), "", " ", LONG, "\u00e9" * 1000, "nan",
        "inf", "9" * 1700, f"{'9' * 400}GB", "[/red]", "a:b", "../x", "/", "cvar@", "cvar@0", "cvar@nan", "none", "free", [], [[]], {},
        {"value": 1}, [{"value": 1}], [{"filter": 3, "value": 1}], {"gradient": []}, {"gradient": "x"}, {"name": "ties", "density": [1, 2, 3]},
        {"name": None}, {"name": [1]}, {"slices": []}, {"slices": [{"model": "b", "layers": [0, 10**9]}]}, {"model": LONG}, [1] * 300, {LONG: 1},
        [{"value": {"value": 1}}], {"a": [LONG] * 10}, [LONG] * 20, ["*"] * 300, [0, 10**9], [-1, 2],
    ]
)  # fmt: skip
NESTED = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "value", "filter", "model", "x", LONG]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
OURS = {"base": "b", "experts": [{"model": "x"}, {"model": "y"}], "evaluation": {"kind": "text_classification"}}
PLACES = [
    *((key,) for key in Recipe.model_fields),
    *((section, key) for section, model in SECTIONS.items() for key in model.model_fields),
    *(("experts", 0, key) for key in ExpertRecipe.model_fields),
    *(("anchor", rule, p["name"]) for rule, anchor in registered_anchors().items() for p in anchor.schema),
]
THEIRS = {
    "base_model": "b",
    "models": [{"model": "x", "parameters": {"weight": 1.0}}, {"model": "b"}],
    "parameters": {"t": 0.5, "weight": 1.0},
}
SLICES = [{"sources": [{"model": "x", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]}]
THEIR_PLACES = [
    *((key,) for key in ("merge_method", "base_model", "models", "slices", "dtype", "tokenizer_source", "tokenizer", "chat_template")),
    *(("parameters", key) for key in KNOWN),
    *(("models", 0, "parameters", key) for key in KNOWN),
    *(("slices", 0, "sources", 0, key) for key in ("model", "layer_range", "parameters")),
]  # fmt: skip


def changed(raw, place, value):
    raw = copy.deepcopy(raw)
    if place[0] == "anchor" and len(place) == 3:
        return raw | {"anchor": {"name": place[1], place[2]: value}}
    if place[0] == "slices" and len(place) > 1:
        raw = {key: own for key, own in raw.items() if key != "models"} | {"slices": copy.deepcopy(SLICES)}
    inner = raw
    for part in place[:-1]:
        inner = inner.setdefault(part, {}) if isinstance(part, str) else inner[part]
    inner[place[-1]] = value
    return raw


def message_of(folder, raw):
    path = folder / "sent.yaml"
    path.write_text(dump_yaml(raw))
    try:
        Recipe.load(path, local_files_only=True)
    except ConfigError as error:
        return str(error)
    return None


quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module", autouse=True)
def _silent():
    logging.disable()  # mergekit's files are warned of what has no effect
    yield
    logging.disable(logging.NOTSET)


@quick
@given(st.sampled_from(PLACES), NESTED)
def test_any_value_anywhere_in_a_recipe(tmp_path_factory, place, value):
    said = message_of(tmp_path_factory.mktemp("r"), changed(OURS, place, value))
    assert said is None or ("sent.yaml" in said and len(said) <= 1500)


@quick
@given(st.sampled_from(sorted(METHODS)), st.sampled_from(THEIR_PLACES), NESTED)
def test_any_value_anywhere_in_mergekits_files(tmp_path_factory, method, place, value):
    said = message_of(tmp_path_factory.mktemp("r"), changed({"merge_method": method} | THEIRS, place, value))
    assert said is None or ("sent.yaml" in said and len(said) <= 1500)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({**OURS, LONG: 1}, "unknown key 'xxx"),
        ({**OURS, "alpha": LONG}, "alpha = 'xxx"),
        ({**OURS, "experts": [{"model": "x", f"{LONG}{i}": 1} for i in range(50)]}, "and 46 more such faults"),
        ({**OURS, "sequential": {"sweeps": 2**53}}, "sequential.sweeps = 9007199254740992"),
        ({**OURS, "search": {"seed": 2**32}}, "search.seed = 4294967296"),
        ({**OURS, "max_shard_size": "9" * 400 + "GB"}, "is not a positive number of bytes"),
        ({**OURS, "max_shard_size": "0"}, "is not a positive number of bytes"),
        ({"merge_method": []} | THEIRS, "merge_method [] is not known here"),
        (
            {"merge_method": "slerp", "base_model": "b", "slices": [{"sources": [{"model": "b", "layer_range": [0, 10**9]}]}]},
            "layer_range = (0, 1000000000): the first layer must not come after the last",
        ),
    ],
)  # fmt: skip
def test_values_from_outside_are_shortened_and_bounded(tmp_path, raw, words):
    said = message_of(tmp_path, raw)
    assert said is not None
    assert words in said
    assert "sent.yaml" in said
    assert len(said) <= 1500

"""Values that differ between experts, over depth, or by the tensor's name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.anchors import DepthMap, get_anchor
from bmm_engine.errors import ConfigError

NAMES = [f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("self_attn.q_proj", "mlp.up_proj")]
DEPTH = DepthMap([*NAMES, "model.embed_tokens.weight", "lm_head.weight"])


def at(raw, name, *, parameter="weight", experts=3):
    return get_anchor("average").parameters({parameter: raw}).at(name, DEPTH(name), experts)[parameter]


def test_depth_runs_from_the_first_layer_to_the_last_and_is_0_outside():
    assert [DEPTH(f"model.layers.{i}.mlp.up_proj.weight") for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert DEPTH("model.embed_tokens.weight") == DEPTH("lm_head.weight") == 0
    assert DepthMap(["h.0.w"])("h.0.w") == 1


def test_stacks_of_layers_are_counted_apart():
    depth = DepthMap([f"encoder.{i}.w" for i in range(3)] + [f"decoder.{i}.w" for i in range(5)])
    assert depth("encoder.2.w") == depth("decoder.4.w") == 1
    assert depth("decoder.2.w") == 0.5


@pytest.mark.parametrize(
    ("raw", "name", "expected"),
    [
        (0.5, NAMES[0], (0.5, 0.5, 0.5)),
        ([1, 2, 3], NAMES[0], (1.0, 2.0, 3.0)),
        ({"gradient": [0, 1]}, NAMES[2], (0.25, 0.25, 0.25)),
        ([{"gradient": [0, 1, 0]}, 2, [4, 8]], NAMES[4], (1.0, 2.0, 6.0)),
        ([{"filter": "mlp", "value": 2}, {"value": 1}], NAMES[1], (2.0,) * 3),
        ([{"filter": "mlp", "value": 2}, {"value": 1}], NAMES[0], (1.0,) * 3),
        ([{"filter": "*.3.*", "value": [7, 8, 9]}], NAMES[6], (7.0, 8.0, 9.0)),
        ([{"filter": "*", "value": 5}, {"filter": "mlp", "value": 2}], NAMES[1], (5.0,) * 3),
        ([{"filter": "nothing", "value": 5}], NAMES[1], (1.0,) * 3),
        ([[{"filter": "mlp", "value": {"gradient": [0, 4]}}, {"value": 9}], 1, 1], NAMES[3], (1.0, 1.0, 1.0)),
    ],
)
def test_forms(raw, name, expected):
    assert at(raw, name) == expected


def test_the_plural_of_a_per_expert_parameter():
    assert get_anchor("average").parameters({"weights": [1, 2]}).at("w", 0.0, 2)["weight"] == (1.0, 2.0)


def test_switches_step_where_numbers_interpolate():
    assert [at([True, False], NAMES[2 * i], parameter="normalize") for i in range(5)] == [True] * 4 + [False]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.integers(0, 4))
def test_a_gradient_stays_between_its_neighbours_and_hits_its_ends(values, layer):
    found = at({"gradient": values}, NAMES[2 * layer])[0]
    assert min(values) - 1e-12 <= found <= max(values) + 1e-12
    assert at({"gradient": values}, NAMES[0])[0] == values[0]
    assert at({"gradient": values}, NAMES[-1])[0] == values[-1]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([1, 2], "2 values for 3 experts"),
        ("large", "weight = 'large'"),
        ([], "an empty list"),
        ({"grad": [1]}, r"is no value; write a value, \{gradient"),
        ([{"filter": "mlp", "value": 1, "where": 2}], "nothing else"),
        ([{"filter": 3, "value": 1}], "as text"),
        ([1, [], 3], "an empty list"),
    ],
)
def test_mistakes(raw, words):
    with pytest.raises(ConfigError, match=words) as caught:
        at(raw, NAMES[0])
    assert "anchor 'average': weight" in str(caught.value)

from __future__ import annotations

import json
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from bmm_engine.errors import ConfigError
from bmm_engine.models.roles import module_role
from bmm_engine.recipe.sections import SearchRecipe
from bmm_engine.searching.objective import get_objective, normalized
from bmm_engine.searching.space import Candidate, Space, module_groups

BERT = ["attention.self.query", "attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense"]
MODULES = [f"encoder.layer.{i}.{leaf}" for i in range(4) for leaf in BERT]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("bert.encoder.layer.3.attention.self.query", "attention_in"),
        ("bert.encoder.layer.3.attention.output.dense", "attention_out"),
        ("bert.encoder.layer.3.intermediate.dense", "mlp_in"),
        ("bert.encoder.layer.3.output.dense", "mlp_out"),
        ("bert.pooler.dense", "other"),
        ("transformer.h.0.attn.c_attn", "attention_in"),
        ("transformer.h.0.attn.c_proj", "attention_out"),
        ("transformer.h.0.mlp.c_fc", "mlp_in"),
        ("transformer.h.0.mlp.c_proj", "mlp_out"),
        ("model.layers.0.self_attn.o_proj", "attention_out"),
        ("model.layers.0.mlp.gate_proj", "mlp_in"),
        ("model.layers.0.mlp.down_proj", "mlp_out"),
        ("blocks.0.attn.qkv", "attention_in"),
        ("blocks.0.attn.proj", "attention_out"),
        ("blocks.0.mlp.fc2", "mlp_out"),
        ("vision_model.encoder.layers.0.self_attn.out_proj", "attention_out"),
        ("encoder.block.0.layer.0.SelfAttention.q", "attention_in"),
        ("encoder.block.0.layer.1.DenseReluDense.wo", "mlp_out"),
        ("distilbert.transformer.layer.0.attention.q_lin", "attention_in"),
    ],
)
def test_roles(name, role):
    assert module_role(name) == role


def test_groups_by_role_and_depth_hold_every_module_once():
    groups = module_groups(MODULES, SearchRecipe(depth_bins=2))
    assert [g.name for g in groups][:2] == ["attention_in.0", "attention_in.1"]
    assert len(groups) == 8
    assert sorted(m for g in groups for m in g.modules) == sorted(MODULES)
    assert {m.split(".")[2] for m in groups[0].modules} == {"0", "1"}


@pytest.mark.parametrize(("kind", "count"), [("role", 4), ("depth", 3), ("all", 1), ("module", 20)])
def test_other_groupings(kind, count):
    groups = module_groups(MODULES, SearchRecipe(groups=kind))
    assert len(groups) == count
    assert sorted(m for g in groups for m in g.modules) == sorted(MODULES)


def test_groups_by_pattern():
    groups = module_groups(MODULES, SearchRecipe(groups={"attention": ["*attention*"], "rest": ["*"]}))
    assert [len(g.modules) for g in groups] == [12, 8]
    with pytest.raises(ConfigError, match=r"takes the module 'encoder.layer.0.intermediate.dense'.*pattern '\*'"):
        module_groups(MODULES, SearchRecipe(groups={"attention": ["*attention*"]}))
    with pytest.raises(ConfigError, match=r"'nothing' \(\*conv\*\) takes no module"):
        module_groups(MODULES, SearchRecipe(groups={"nothing": ["*conv*"], "rest": ["*"]}))


def space(**options):
    section = SearchRecipe(**options)
    groups = module_groups(MODULES, section)
    names = {g.name for g in groups}
    return Space(
        groups,
        ("average", "tsv_m"),
        dict.fromkeys(names, 0.03),
        dict.fromkeys(names, 1.0),
        "none",
        section,
        () if section.weightings == "free" else tuple(section.weightings),
        3 if section.weightings == "free" else 0,
    )


@pytest.mark.parametrize("scale", ["fixed", "global", "group"])
@pytest.mark.parametrize("weights", [[], ["none", "energy"], "free"])
def test_a_point_of_the_space_is_its_candidate_again(scale, weights):
    own = space(scales=scale, weightings=weights, groups="role")
    parametrization = own.parametrization()
    parametrization.random_state.seed(0)
    for _ in range(20):
        candidate = own.decode(parametrization.sample().value)
        again = own.decode(own.encode(candidate))
        for group, alpha in candidate.alpha.items():
            assert again.alpha[group] == pytest.approx(alpha, rel=1e-5)
        assert again.anchor == candidate.anchor
        assert Candidate.from_plain(json.loads(json.dumps(candidate.plain(), allow_nan=False))) == candidate
        if weights == "free":
            assert sum(candidate.task_weights) == pytest.approx(3, rel=1e-4)


def test_the_top_of_the_range_is_the_anchor_itself():
    own = space(groups="all")
    values = {"alpha all": 4.0, "scale ": 1.0, "anchor": "tsv_m"}
    assert own.decode(values).alpha == {"all": math.inf}
    assert own.encode(own.decode(values))["alpha all"] == pytest.approx(4.0)


def test_the_first_candidates_are_the_anchors_and_the_defaults():
    first = space(groups="all").first_candidates()
    assert [(kind, c.anchor, c.alpha["all"]) for kind, c in first] == [
        ("anchor", "average", math.inf),
        ("anchor", "tsv_m", math.inf),
        ("default", "average", 0.03),
        ("default", "tsv_m", 0.03),
    ]


scores = st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0.01, 2), min_size=1, max_size=8)


@given(scores, st.floats(0.01, 1))
def test_cvar_lies_between_worst_and_mean_and_falls_with_the_share(values, share):
    cvar, worst, mean = (get_objective(n)(values) for n in (f"cvar@{share}", "worst", "mean"))
    assert worst - 1e-9 <= cvar <= mean + 1e-9
    assert get_objective("cvar@1")(values) == pytest.approx(mean)
    assert get_objective(f"cvar@{min(1 / len(values), 1)}")(values) == pytest.approx(worst)


def test_objectives_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_objective.py").write_text("def least(values):\n    return min(values.values()) - 1\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert get_objective("own_objective:least")({"a": 0.5, "b": 0.75}) == -0.5
    for name, message in [
        ("own_objective:most", "cannot be imported"),
        ("own_objective:number", "is of type int, and not a function"),
        ("cvar@2", r"share must be in \(0, 1\]"),
        ("maen", "did you mean 'mean'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            get_objective(name)
    with pytest.raises(ConfigError, match="returned nan"):
        get_objective(lambda values: float("nan"))({"a": 1.0})


def test_an_expert_that_scores_nothing_is_named():
    with pytest.raises(ConfigError, match="task 'b': its own expert scores 0"):
        normalized({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.0})

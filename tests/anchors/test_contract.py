"""The contract of a rule: its schema, its registration, plugins, what it is called with."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Literal

import pytest
import torch
from pydantic import Field

from bmm_engine.anchors import PerExpert, anchor, contract, each, get_anchor, registered_anchors, table
from bmm_engine.errors import ConfigError


@pytest.fixture
def registry(monkeypatch):
    """Rules registered here are gone after the test."""
    monkeypatch.setattr(contract, "_registry", dict(contract._registry))
    return contract._registry


def test_a_signature_is_the_schema(registry):
    @anchor(scope="tensor", elementwise=True, paper="none")
    def leaning(
        base, experts, *, share: PerExpert[Annotated[float, Field(ge=0, le=1)]] = each(0.5), loud: bool = False
    ):
        """The sum of the experts' shares."""
        assert len(share) == len(experts)
        return base + sum(s * (e - base) for s, e in zip(share, experts)) * (2 if loud else 1)

    rule = get_anchor("leaning")
    assert rule is leaning
    assert rule.summary == "The sum of the experts' shares."
    assert rule.defaults == {"share": 0.5, "loud": False}
    assert rule.schema[0] == {"name": "share", "type": "float", "per_expert": True, "default": 0.5}
    base, experts = torch.zeros(2), [torch.ones(2), torch.ones(2)]
    assert torch.equal(rule(base, experts), torch.ones(2))
    assert torch.equal(rule(base, experts, share=[1.0, 0.5], loud="true"), torch.full((2,), 3.0))
    with pytest.raises(ConfigError, match=r"'leaning': share = 1\.5"):
        rule(base, experts, share=1.5)
    with pytest.raises(ConfigError, match="did you mean 'share'"):
        rule(base, experts, shar=0.5)
    assert "| `leaning` | The sum of the experts' shares. | `share=0.5*`, `loud=false` | none |" in table.markdown()


def test_a_rule_is_told_where_it_is_and_what_its_reduction_found(registry):
    def reduce(model):
        return (
            sum(model.map(lambda site: int(site.base.numel()))),
            model.constant("power"),
            [s.name for s in model.sites()],
        )

    @anchor(scope="model", paper="none", reduce=reduce)
    def curious(base, experts, *, site, state, power: int = 2):
        """Returns what it was told."""
        assert site.parameters == {"power": 3}
        assert (site.linear, site.shape, site.first) == (True, (2, 3), 0)
        return torch.tensor([state[0], state[1], site.seed(0, 1) != site.seed(0, 2), state[2] == ["w"]])

    assert get_anchor("curious")(torch.zeros(2, 3), [torch.zeros(2, 3)], power=3, name="w").tolist() == [6, 3, 1, 1]


def test_what_a_rule_needs_may_depend_on_its_parameters(registry):
    def wanted(parameters):
        return {"plain": (), "sharp": ("fishers",), "both": ("grams", "sensitivities")}[parameters["by"]]

    @anchor(scope="module", paper="none", needs=wanted)
    def weighed(base, experts, *, site, by: Literal["plain", "sharp", "both"] = "sharp", size: float = 1.0):
        """Its own sums."""
        return base * len(site.sensitivities)

    assert weighed.needs_of() == {"fishers"}
    assert weighed.needs_of({"by": "plain", "size": [0.0, 1.0]}) == set()
    assert weighed.needs_of({"by": "both"}) == {"grams", "sensitivities"}
    # Over the model all that it reads anywhere; where no filter matches, the default holds.
    assert weighed.needs_of({"by": [{"filter": "mlp", "value": "both"}]}) == {"grams", "sensitivities", "fishers"}
    mixed = {"by": [{"filter": "mlp", "value": "both"}, {"value": "plain"}]}
    assert weighed.needs_of(weighed.parameters(mixed)) == {"grams", "sensitivities"}
    assert weighed.needs_of({"by": ["plain", "sharp"]}) == {"fishers"}  # over depth
    assert weighed(torch.ones(1, 2), [torch.ones(1, 2)] * 2, sensitivities=[torch.eye(1)] * 2).tolist() == [[2.0, 2.0]]
    assert "| `weighed` | Its own sums. Needs Fisher information at its defaults. |" in table.markdown()
    assert next(row["needs"] for row in table.rows() if row["name"] == "weighed") == "fishers"


def test_what_contradicts_itself_is_refused(registry):
    with pytest.raises(ConfigError, match=r"a rule has a `reduce` exactly if"):
        anchor(scope="model", paper="none")(lambda base, experts: base)

    def average(base, experts):
        return base

    with pytest.raises(ConfigError, match=r"'average' is already registered by bmm_engine\.anchors\.average"):
        anchor(scope="tensor", paper="none")(average)

    def lacking(base, experts, *, share: float):
        return base

    with pytest.raises(ConfigError, match="'share' has no default"):
        anchor(scope="tensor", paper="none")(lacking)
    with pytest.raises(ConfigError, match="what it needs, 'gram', is not one of grams, sequential_grams"):
        anchor(scope="tensor", paper="none", needs="gram")(lacking)


def test_number_of_experts():
    with pytest.raises(ConfigError, match="'slerp' merges exactly 1 experts beside the base, not 2"):
        get_anchor("slerp")(torch.ones(3), [torch.ones(3)] * 2)


def test_plugins_are_entry_points_and_a_broken_one_is_said(registry, monkeypatch, caplog):
    class Point:
        def __init__(self, name, value, action):
            self.name, self.value, self.load = name, value, action

    def good():
        @anchor(scope="tensor", paper="a plugin")
        def plugged(base, experts):
            """From outside."""
            return base

    def bad():
        raise ImportError("no such module")

    points = [Point("bad", "nowhere:rule", bad), Point("good", "somewhere:rule", good)]
    monkeypatch.setattr(contract, "_plugins_loaded", False)
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == "bmm_engine.anchors" else [])
    assert registered_anchors()["plugged"].paper == "a plugin"
    assert "the plugin bad (nowhere:rule) does not load: ImportError: no such module" in caplog.text


def test_seeds_depend_on_name_expert_and_seed_alone():
    site = contract.Site("a.weight", torch.zeros(1), [], {}, (1,))
    other = contract.Site("b.weight", torch.zeros(1), [], {}, (1,))
    seeds = {site.seed(0, 0), site.seed(0, 1), site.seed(1, 0), other.seed(0, 0)}
    assert len(seeds) == 4
    assert site.seed(0, 0) == 0x720FA7F5900CB1C1, "the same in every process and version"
    assert all(0 <= s < 2**64 for s in seeds)

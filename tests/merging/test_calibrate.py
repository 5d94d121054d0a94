"""The option `calibrate` through whole merges: any rule's linear modules, before a solve, in walks and searches too; nothing else changes."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import get_args

import pytest
import torch

from bmm_engine import collect_grams, merge, merge_sequential
from bmm_engine.anchors import DepthMap, Site
from bmm_engine.anchors.calibration import AFTER
from bmm_engine.anchors.calibration.larv import diagnose, layer_scales
from bmm_engine.errors import ConfigError, NonFiniteWeightError
from bmm_engine.executors import open_executor
from bmm_engine.merging.plan import make_plan
from bmm_engine.merging.sources import Models
from bmm_engine.merging.stream import MergeStream
from bmm_engine.ops.lowrank import LowRank
from bmm_engine.recipe.sections import SearchRecipe
from bmm_engine.recipe.settings import Algebra, MergeSettings
from bmm_engine.searching.problem import FunctionTasks, Problem
from bmm_engine.searching.session import prepare
from bmm_engine.statistics.sets import Statistics
from tests.numerics import relative_error
from tests.tiny import family, fine_tune, make_base, make_batches

# By element, after a pass over the model, by matrix.
RULES = ["average", "ties", "tsv_m"]


# Weights of gpt2 are transposed; the test that asks for both has llama's too.
@pytest.fixture(scope="module")
def models(request):
    base = make_base(getattr(request, "param", "gpt2"))
    return base, [fine_tune(base, seed) for seed in (1, 2, 3)]


def linear_of(base, experts):
    plan = make_plan(MergeSettings(), Models.open(base, experts), Statistics())
    return {m.weight: m for m in plan.linear.values()}


def oriented(tensor, module):
    return (tensor.mT if module.transposed else tensor).double()


@pytest.mark.parametrize("models", ["gpt2", "llama"], indirect=True)
@pytest.mark.parametrize("calibrate", AFTER)
@pytest.mark.parametrize("rule", RULES)
def test_linear_modules_of_any_rule_are_calibrated_and_nothing_else(models, rule, calibrate, monkeypatch):
    base, experts = models
    options = {"anchor": rule, "alpha": math.inf}
    plain = merge(base, experts, **options).tensors
    found = merge(base, experts, calibrate=calibrate, **options).tensors
    linear, state, others = linear_of(base, experts), base.state_dict(), [e.state_dict() for e in experts]
    assert {n for n in plain if not torch.equal(plain[n], found[n])} == set(linear)
    for name, module in linear.items():
        start = oriented(state[name], module)
        taus = [oriented(own[name], module) - start for own in others]
        wanted = AFTER[calibrate](oriented(plain[name], module) - start, taus)
        # The plain merge is rounded to float32, which directions feel of which it has little.
        assert relative_error(oriented(found[name], module) - start, wanted) < 1e-4, name
    monkeypatch.setattr("bmm_engine.merging.stream.SLAB_ELEMENTS", 300)
    again = merge(base, experts[::-1], calibrate=calibrate, **options).tensors
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())


def rescaled(base, experts):
    """The experts of larv, and the scales."""
    state, others = base.state_dict(), [e.state_dict() for e in experts]
    depth, layers, linear = DepthMap(state), {}, linear_of(base, experts)
    for name, module in linear.items():
        start = oriented(state[name], module)
        own = [diagnose(start, oriented(other[name], module) - start) for other in others]
        layers.setdefault(depth.layer(name), []).extend(own)
    scales = layer_scales(layers)
    assert len(set(scales.values())) > 1
    found = []
    for other in others:
        for name in linear:
            start = state[name].double()
            other = other | {name: (start + scales[depth.layer(name)] * (other[name].double() - start)).float()}
        found.append(other)
    return found


@pytest.mark.parametrize("rule", RULES)
def test_larv_merges_experts_whose_layers_are_scaled(models, rule, monkeypatch):
    base, experts = models
    options = {"anchor": rule, "alpha": math.inf}
    found = merge(base, experts, calibrate="larv", **options).tensors
    wanted = merge(base, rescaled(base, experts), **options, unchecked_configs=True).tensors
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr("bmm_engine.merging.stream.SLAB_ELEMENTS", 300)
    again = merge(base, experts[::-1], calibrate="larv", **options).tensors
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())


@pytest.mark.parametrize("rule", ["average", "tsv_m"])
@pytest.mark.parametrize("calibrate", [*AFTER, "larv"])
def test_a_solve_has_the_calibrated_merge_for_its_prior(models, rule, calibrate):
    """`W* = W_a + R A^{-1}` moves by `lam (W_a' - W_a) A^{-1}` where the anchor moves; the experts of the solve are as they were."""
    base, experts = models
    alpha = 0.3
    anchors = [merge(base, experts, anchor=rule, calibrate=c, alpha=math.inf).tensors for c in (None, calibrate)]
    solved = [merge(base, experts, anchor=rule, calibrate=c, alpha=alpha).tensors for c in (None, calibrate)]
    state, others = base.state_dict(), [e.state_dict() for e in experts]
    for name, module in linear_of(base, experts).items():
        start = oriented(state[name], module)
        taus = [oriented(own[name], module) - start for own in others]
        gram = sum(tau.mT @ tau / tau.square().sum() for tau in taus)
        ridge = alpha * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
        moved = oriented(anchors[1][name], module) - oriented(anchors[0][name], module)
        wanted = oriented(solved[0][name], module) + moved @ ridge @ torch.linalg.inv(gram + ridge)
        torch.testing.assert_close(oriented(solved[1][name], module), wanted, rtol=1e-5, atol=1e-6)


def test_larv_asks_all_experts():
    """Three layers, of which the first expert changed one in few directions, the second another."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, 8, 8, generator=generator)
    base = {f"layers.{n}.w.weight": draw() for n in range(3)}
    few = torch.outer(draw()[0], draw()[0])
    changes = [[few, draw(), draw()], [draw(), 100 * few, draw()]]
    experts = [{k: w + 0.01 * c for (k, w), c in zip(base.items(), own, strict=True)} for own in changes]
    found = []
    for chosen in (experts, experts[:1], experts[1:]):
        options = {"modules": ["layers*"], "alpha": math.inf, "anchor": "average"}
        plain, scaled = (merge(base, chosen, calibrate=c, **options).tensors for c in (None, "larv"))
        scales = [float((scaled[n] - base[n]).norm() / (plain[n] - base[n]).norm()) for n in base]
        own = {
            ("layers.", n, 3): [diagnose(base[k], e[k].double() - base[k].double()) for e in chosen]
            for n, k in enumerate(base)
        }
        assert scales == pytest.approx(list(layer_scales(own).values()), rel=1e-4)
        found.append([round(scale, 2) for scale in scales])
    assert found[0] != found[1] != found[2] != found[0]


def test_every_choice_is_known():
    (choices,) = (c for c in get_args(Algebra.model_fields["calibrate"].annotation) if c is not type(None))
    assert set(get_args(choices)) == {*AFTER, "larv"}


@pytest.mark.parametrize("calibrate", AFTER)
def test_where_biases_are_solved_too_only_the_weights_of_the_anchor_are_calibrated(models, calibrate):
    base, experts = models
    batches = [make_batches(base.config.model_type, 5 + t, 2) for t in range(3)]
    grams = [collect_grams(e, own) for e, own in zip(experts, batches, strict=True)]
    options = {"anchor": "regmean", "grams": grams, "calibrate": calibrate}
    alone = merge(base, experts, alpha=math.inf, **options).tensors
    near = merge(base, experts, alpha=1e9, fit_bias=True, **options).tensors
    for name, tensor in alone.items():
        torch.testing.assert_close(near[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("calibrate", [*AFTER, "larv"])
def test_walks_and_searches_have_the_calibrated_anchor(models, calibrate):
    base, experts = models
    architecture = base.config.model_type
    batches = [make_batches(architecture, 5 + t, 2) for t in range(3)]
    options = {"anchor": "task_arithmetic", "calibrate": calibrate}
    alone = merge(base, experts, alpha=math.inf, **options).tensors
    walked = merge_sequential(base, experts, batches, alpha=1e9, fit_bias=False, **options).tensors
    for name in linear_of(base, experts):
        torch.testing.assert_close(walked[name], alone[name], rtol=1e-5, atol=1e-6)
    problem = Problem(
        Models.open(base, experts),
        MergeSettings(**options),
        Statistics(),
        FunctionTasks(base, experts, ("a",), lambda model, task: 1.0),
        SearchRecipe(),
        {"task_arithmetic": ("task_arithmetic", {})},
    )
    with open_executor() as executor:
        factors = prepare(problem, lambda: problem, executor).shared.tensors()
    for name, tensor in alone.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(factors[f"a task_arithmetic {name}"], tensor, rtol=0, atol=0)


def test_a_task_vector_that_is_known_as_a_product_is_scaled_as_one():
    generator = torch.Generator().manual_seed(3)
    base = {f"layers.{n}.w.weight": torch.randn(6, 8, generator=generator) for n in range(2)}
    experts = [{k: w + 0.1 * torch.randn(6, 8, generator=generator) for k, w in base.items()} for _ in range(2)]
    settings = MergeSettings(modules=["layers*"], alpha=math.inf, anchor="tsv_m", calibrate="larv")
    stream = MergeStream(make_plan(settings, Models.open(base, experts), Statistics()))
    products = [LowRank(torch.randn(6, 2, generator=generator), torch.randn(2, 8, generator=generator)), None]
    list(stream)
    for number, scale in ((0, 0.8), (1, 1.2)):
        name = f"layers.{number}.w.weight"
        site = Site(name, base[name], [e[name] for e in experts], {}, (6, 8), linear=True, low_rank=products)
        found = stream.calibrator.before(site)
        torch.testing.assert_close(found.low_rank[0].dense(), scale * products[0].dense(), rtol=1e-6, atol=1e-7)
        assert found.low_rank[1] is None
        torch.testing.assert_close(found.experts[1] - base[name], scale * (experts[1][name] - base[name]))


def test_the_record_says_it_and_mistakes_are_named(tmp_path):
    base, experts, base_path, paths = family("bert", tmp_path)
    result = merge(base_path, paths, calibrate="svc", alpha=math.inf, output=tmp_path / "merged")
    records = [json.loads(p.read_text()) for p in result.path.glob("*.json")]
    assert any(r.get("recipe", {}).get("calibrate") == "svc" for r in records)
    with pytest.raises(ConfigError, match=r"calibrate = 'scv': .*'svc', 'subspace_boost' or 'larv'"):
        merge(base, experts, calibrate="scv")
    with torch.no_grad():
        experts[1].bert.encoder.layer[1].output.dense.weight[0, 0] = math.nan
    for calibrate in ("svc", "larv"):
        with pytest.raises(NonFiniteWeightError, match=r"layer\.1\.output\.dense\.weight"):
            merge(base, experts, calibrate=calibrate, alpha=math.inf)
    scaling = [{"filter": "layer.1.attention.self.query", "value": 1e39}, {"value": 1.0}]
    far = {"anchor": "task_arithmetic", "anchor_parameters": {"scaling": scaling}, "alpha": math.inf}
    with pytest.raises(
        NonFiniteWeightError, match=r"calibrate 'svc': of tensor .*query.*, as anchor 'task_arithmetic' merges it"
    ):
        merge(base, [fine_tune(base, 1)], calibrate="svc", **far)

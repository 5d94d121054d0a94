"""How much experts agree, and what a data-free merge makes of it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import bmm_engine as bmm
from bmm_engine.errors import ConfigError
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.solving.agreement import agreement, shrunk
from tests.numerics import relative_error
from tests.tiny import fine_tune, make_base, save


def weights(count, rows=700):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_it_is_the_share_of_the_mean():
    base, *experts = weights(4)
    vectors = torch.stack(experts) - base
    truth = float(vectors.mean(0).square().sum() / vectors.square().sum((1, 2)).mean())
    assert agreement(base, experts) == pytest.approx(truth, rel=1e-12)
    assert shrunk(1.5, 0.2, base, experts) == pytest.approx(1.5 * (1 - 0.2 * (1 - truth)), rel=1e-12)


def test_equal_experts_are_not_shrunk_and_disjoint_ones_most():
    base, expert = weights(2)
    assert agreement(base, [expert] * 3) == pytest.approx(1.0, abs=1e-12)
    assert agreement(base, [base] * 2) == 1.0
    assert shrunk(0.7, 0.0, base, [expert]) == 0.7
    change = expert - base
    halves = [base + change * (torch.arange(700)[:, None] % 2 == k) for k in (0, 1)]
    assert agreement(base, halves) == pytest.approx(0.5, rel=1e-12)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    base = make_base("llama")
    return [
        save(m, folder / name) for name, m in (("base", base), ("a", fine_tune(base, 1)), ("b", fine_tune(base, 2)))
    ]


def merged(files, tmp_path, **keys):
    base, *experts = files
    recipe = Recipe.parse({"base": str(base), "experts": list(map(str, experts)), **keys})
    run_recipe(recipe, tmp_path / "out", progress=False)
    return tmp_path / "out"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def test_a_recipe_without_data_weighs_outputs_and_shrinks(files, tmp_path):
    found = tensors_of(merged(files, tmp_path))
    base, *experts = files
    given = {"sensitivities": "task_vectors", "progress": False}
    weighed = bmm.merge(base, experts, **given).tensors
    truth = bmm.merge(base, experts, shrinkage=0.2, **given).tensors
    assert all(torch.equal(found[name], truth[name]) for name in found)
    start, first, second = map(tensors_of, files)
    moved = 0
    for name, tensor in weighed.items():
        if torch.equal(tensor, truth[name]):
            continue
        moved += 1
        scale = shrunk(1.0, 0.2, start[name], [first[name], second[name]])
        assert relative_error(truth[name], start[name].double() + scale * (tensor - start[name]).double()) < 1e-5
    assert moved > 5


def test_both_can_be_switched_off(files, tmp_path):
    found = tensors_of(merged(files, tmp_path, output_weights="none"))
    truth = bmm.merge(files[0], files[1:], progress=False).tensors
    assert all(torch.equal(found[name], truth[name]) for name in found)


def test_a_walk_and_a_search_refuse_it(files):
    with pytest.raises(ConfigError, match=r"shrinkage = 0\.1, but a walk"):
        bmm.merge_sequential(files[0], files[1:], [[], []], shrinkage=0.1, progress=False)
    base = make_base("llama")
    with pytest.raises(ConfigError, match="leave out shrinkage"):
        bmm.search(base, [fine_tune(base, 1)] * 2, lambda model, task: 1.0, shrinkage=0.1, trials=2)

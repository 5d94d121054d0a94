"""Fisher-weighted averaging against a float64 oracle written from its formula."""

from __future__ import annotations

import pytest
import torch

from bmm_engine.anchors import Site
from bmm_engine.anchors.fisher import fisher, fisher_norms
from bmm_engine.errors import ConfigError, ShapeMismatchError
from tests.numerics import relative_error


def problem(tasks=3, shape=(6, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    experts = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(tasks)]
    # Around the floor of 1e-6, and of different sizes.
    fishers = [10.0 ** (2 * t) * 1e-6 * torch.rand(shape, generator=generator).pow(3) for t in range(tasks)]
    return base, experts, fishers


def oracle(experts, fishers, weight=None, normalize=True, floor=1e-6, floor_by="max"):
    """arXiv 2111.09832: c_t times the floored F_t, divided by F_t's norm."""
    experts, fishers = [e.double() for e in experts], [f.double() for f in fishers]
    weight = weight or [1.0] * len(experts)
    floors = floor if isinstance(floor, list) else [floor] * len(experts)
    total, summed = torch.zeros_like(experts[0]), torch.zeros_like(experts[0])
    for c, own, expert, least in zip(weight, fishers, experts, floors):
        norm = own.square().sum().sqrt() + (least if floor_by == "add" else 0) if normalize else 1.0
        raised = own + least if floor_by == "add" else own.clamp(min=least)
        total += c / norm * raised
        summed += c / norm * raised * expert
    return summed / total


@pytest.mark.parametrize("shape", [(6, 9), (7,), (), (1, 1), (2, 3, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False},
        {"floor_by": "add"},
        {"floor_by": "add", "normalize": False},
        {"weight": [1.0, 0.0, 3.0], "floor": 0.0},
        {"floor": [1e-4, 0.0, 0.0]},
    ],
)
def test_matches_its_formula(shape, options):
    base, experts, fishers = problem(shape=shape)
    merged = fisher(base, experts, fishers=fishers, **options)
    assert merged.dtype == base.dtype
    assert merged.shape == base.shape
    assert relative_error(merged, oracle(experts, fishers, **options)) < 1e-6


def test_the_norm_is_over_the_whole_model():
    parts = [problem(shape=shape, seed=seed) for seed, shape in enumerate([(4, 5), (3,), (2, 2)])]

    class Whole:
        def sites(self):
            for i, (base, experts, fishers) in enumerate(parts):
                yield Site(f"t{i}", base, experts, {}, tuple(base.shape), fishers=() if i == 2 else fishers)

        def constant(self, parameter):
            return {"normalize": True, "floor": (1e-6,) * 3, "floor_by": "max"}[parameter]

    norms = fisher_norms(Whole())
    for t in range(3):
        flat = torch.cat([fishers[t].double().reshape(-1) for _, _, fishers in parts[:2]])
        assert norms[t] == pytest.approx(float(flat.norm()), rel=1e-11)


def test_scale_and_equal_experts_do_not_matter():
    base, experts, fishers = problem()
    merged = fisher(base, experts, fishers=fishers, floor=0.0)
    scaled = fisher(base, experts, fishers=[f * s for f, s in zip(fishers, (1e-12, 1.0, 1e12))], floor=0.0)
    torch.testing.assert_close(merged, scaled, rtol=1e-6, atol=1e-6)
    assert torch.equal(fisher(base, [experts[1]] * 3, fishers=fishers), experts[1])
    assert torch.equal(fisher(base, experts[:1], fishers=fishers[:1]), experts[0])


def test_entries_without_information_and_tensors_without_fisher_take_the_mean():
    base, experts, fishers = problem()
    for own in fishers:
        own[2, 3] = 0
    mean = (experts[0].double() + 2 * experts[1].double() + experts[2].double()) / 4
    for normalize in (True, False):
        merged = fisher(base, experts, fishers=fishers, floor=0.0, normalize=normalize, weight=[1.0, 2.0, 1.0])
        assert float(merged[2, 3]) == pytest.approx(float(mean[2, 3]), rel=1e-6)
    merged = fisher(base, experts, normalize=False, weight=[1.0, 2.0, 1.0])
    assert relative_error(merged, mean) < 1e-6


def test_misuse():
    base, experts, fishers = problem()
    with pytest.raises(ConfigError, match="expert 1 is 0 everywhere"):
        fisher(base, experts, fishers=[fishers[0], torch.zeros(6, 9), fishers[2]])
    with pytest.raises(ShapeMismatchError, match=r"\(5, 9\).*\(6, 9\)"):
        fisher(base, experts, fishers=[fishers[0], fishers[1], fishers[2][:5]])
    with pytest.raises(ConfigError, match="2 Fisher tensors for 3 experts"):
        fisher(base, experts, fishers=fishers[:2], normalize=False)
    with pytest.raises(ConfigError, match="all 0"):
        fisher(base, experts, fishers=fishers, weight=0.0)

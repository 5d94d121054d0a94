"""EpiMer against a float64 oracle with curvatures as (out in, out in) matrices, and its laws."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from bmm_engine.anchors import Site, get_anchor, polar
from bmm_engine.anchors.epimer import epimer
from bmm_engine.errors import ConfigError, NonFiniteGramError, NotPositiveDefiniteError, ShapeMismatchError
from bmm_engine.ops.lowrank import LowRank
from bmm_engine.solving.moments import DenseMoment
from tests.numerics import relative_error

tsv_m = get_anchor("tsv_m")
METRICS = ["fisher", "kfac", "gram", "identity"]
RANK = 3


class Problem:
    """Experts of a module (out, in), and all that can be measured on them, in float64."""

    def __init__(self, tasks=3, out=10, width=14, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.base = drawn(out, width)
        self.taus = [0.1 * drawn(out, width) for _ in range(tasks)]
        self.grams = [self._square(drawn(40, width) @ drawn(width, width)) for _ in range(tasks)]
        self.sensitivities = [self._square(drawn(6, out)) for _ in range(tasks)]
        self.fishers = [drawn(out, width).square() for _ in range(tasks)]

    @staticmethod
    def _square(rows):
        return rows.T @ rows / len(rows)

    @property
    def experts(self):
        return [self.base + tau for tau in self.taus]

    @property
    def measured(self):
        return {"grams": self.grams, "sensitivities": self.sensitivities, "fishers": self.fishers}

    def merge(self, metric, **options):
        merged = epimer(self.base, self.experts, **{"rank": RANK, "metric": metric, **self.measured, **options})
        return merged - self.base

    def diagnose(self, metric, **options):
        given = {**epimer.defaults, "rank": RANK, "metric": metric, **options}
        site = Site("w", self.base, self.experts, given, tuple(self.base.shape), 0, True, **self.measured)
        epimer.apply(site)
        return site.diagnostics

    def curvatures(self, metric):
        """H_t (out in, out in), for rows of a matrix one after the other."""
        out, width = self.base.shape
        ones = torch.eye(out, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
        if metric == "fisher":
            return [torch.diag(f.reshape(-1)) for f in self.fishers]
        left = self.sensitivities if metric == "kfac" else [ones[0]] * len(self.taus)
        right = self.grams if metric in ("kfac", "gram") else [ones[1]] * len(self.taus)
        return [torch.kron(s, g) for s, g in zip(left, right)]

    def atoms(self, rank=RANK):
        """S (out in, p), and d_t (T, p)."""
        triples = [torch.linalg.svd(tau, full_matrices=False) for tau in self.taus]
        u, vh = (
            a @ b
            for a, _, b in (
                torch.linalg.svd(torch.cat([u[:, :rank] for u, _, _ in triples], 1), full_matrices=False),
                torch.linalg.svd(torch.cat([vh[:rank] for _, _, vh in triples]), full_matrices=False),
            )
        )
        columns = torch.stack([torch.outer(u[:, a], vh[a]).reshape(-1) for a in range(len(vh))], 1)
        labelled = torch.zeros(len(triples), len(vh), dtype=torch.float64)
        for t, (_, s, _) in enumerate(triples):
            labelled[t, t * rank : (t + 1) * rank] = s[:rank]
        return columns, labelled


def oracle(own, metric, coordinates="labelled", rank=RANK, scaling=1.0, damping=1e-3, ridge=0.0):
    """The formulas as they are written: labelled the scaled Frechet mean of damped curvatures, exact the ridged minimiser."""
    s, labelled = own.atoms(rank)
    projected = torch.stack([s.T @ h @ s for h in own.curvatures(metric)])
    level, one = projected.mean(0).diagonal().mean(), torch.eye(s.shape[1], dtype=torch.float64)
    if coordinates == "labelled":
        damped = projected + damping * level * one
        pulls = sum(h @ d for h, d in zip(damped, labelled))
        tsv = labelled.sum(0)
        d = torch.linalg.solve(damped.mean(0) + ridge * level * one, pulls + ridge * level * tsv)
    else:
        pulls = sum(s.T @ h @ tau.reshape(-1) for h, tau in zip(own.curvatures(metric), own.taus)) / len(labelled)
        lam = (damping + ridge) * level
        d = torch.linalg.solve(projected.mean(0) + lam * one, pulls + lam * labelled.sum(0))
    return scaling * (s @ d).reshape(own.base.shape)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("coordinates", ["labelled", "exact"])
@pytest.mark.parametrize(("tasks", "out", "width"), [(3, 10, 14), (2, 12, 7), (1, 5, 6)])
def test_matches_its_formula(metric, coordinates, tasks, out, width):
    own = Problem(tasks, out, width)
    for options in ({}, {"damping": 0.1, "scaling": -1.5, "ridge": 0.3}, {"rank": 1}):
        truth = oracle(own, metric, coordinates, **options)
        got = own.merge(metric, coordinates=coordinates, **options)
        assert relative_error(got, truth) < 1e-9, options


def test_the_rank_is_what_the_matrix_has_room_for():
    own = Problem(3, 10, 14)
    assert relative_error(own.merge("fisher", rank=32), oracle(own, "fisher", rank=3)) < 1e-9
    few = Problem(5, 4, 6)
    assert torch.equal(few.merge("kfac"), torch.zeros(4, 6, dtype=torch.float64))
    assert torch.equal(epimer(few.base, [few.base] * 3, metric="gram", grams=few.grams[:3]), few.base), (
        "without task vectors"
    )


def test_tsv_m_of_a_rank_is_its_formula():
    own = Problem()
    s, labelled = own.atoms()
    tsv = tsv_m(own.base, own.experts, rank=RANK) - own.base
    assert relative_error(tsv, (s @ labelled.sum(0)).reshape(own.base.shape)) < 1e-9
    assert torch.equal(tsv_m(own.base, own.experts, rank=9), tsv_m(own.base, own.experts))


@pytest.mark.parametrize("metric", METRICS)
def test_equal_curvatures_are_tsv_m(metric):
    own = Problem()
    for key, found in own.measured.items():
        setattr(own, key, [found[0]] * 3)
    tsv = tsv_m(own.base, own.experts, rank=RANK) - own.base
    assert relative_error(own.merge(metric, damping=1e-6), tsv) < 1e-9
    assert own.diagnose(metric)["eta"] == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(("metric", "coordinates"), [("fisher", "labelled"), ("kfac", "exact"), ("identity", "exact")])
@pytest.mark.parametrize("option", ["damping", "ridge"])
def test_an_infinite_damping_or_ridge_is_tsv_m(metric, coordinates, option):
    own = Problem()
    tsv = tsv_m(own.base, own.experts, rank=RANK) - own.base
    distances = [
        relative_error(own.merge(metric, coordinates=coordinates, **{option: size}), tsv) for size in (1e-3, 1e3, 1e11)
    ]
    assert distances[0] > 0.01
    assert distances[0] / 100 > distances[1] > distances[2]
    assert distances[2] < 1e-9
    assert relative_error(own.merge(metric, coordinates=coordinates, **{option: math.inf}), tsv) < 1e-12


def test_no_curvature_anywhere_is_tsv_m():
    own = Problem()
    own.sensitivities = [torch.zeros(10, 10)] * 3
    tsv = tsv_m(own.base, own.experts, rank=RANK) - own.base
    for coordinates in ("labelled", "exact"):
        assert relative_error(own.merge("kfac", coordinates=coordinates), tsv) < 1e-12


def test_one_task_is_its_expert_at_that_rank():
    own = Problem(tasks=1)
    u, s, vh = torch.linalg.svd(own.taus[0], full_matrices=False)
    assert relative_error(own.merge("kfac", scaling=2.0), 2 * (u[:, :RANK] * s[:RANK]) @ vh[:RANK]) < 1e-9


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("coordinates", ["labelled", "exact"])
def test_neither_order_nor_signs_nor_units_matter(metric, coordinates, monkeypatch):
    own = Problem()
    merged = own.merge(metric, coordinates=coordinates)
    for order in permutations(range(3)):
        turned = Problem()
        for key in ("taus", *own.measured):
            setattr(turned, key, [getattr(own, key)[t] for t in order])
        assert relative_error(turned.merge(metric, coordinates=coordinates), merged) < 1e-9
    for unit in (1e-25, 1e20):
        scaled = Problem()
        scaled.fishers = [unit * f for f in own.fishers]
        scaled.grams = [unit * g for g in own.grams]
        assert relative_error(scaled.merge(metric, coordinates=coordinates), merged) < 1e-9

    def flipped(site, count):
        signs = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
        return [(u * signs, s, signs[:, None] * vh) for u, s, vh in found(site, count)]

    found = polar.task_triples
    monkeypatch.setattr(polar, "task_triples", flipped)
    assert relative_error(own.merge(metric, coordinates=coordinates), merged) < 1e-9


@pytest.mark.parametrize("coordinates", ["labelled", "exact"])
def test_normalized_no_task_counts_for_the_size_of_its_curvature(coordinates):
    own, louder = Problem(), Problem()
    louder.sensitivities[1] = 100 * own.sensitivities[1]
    options = {"coordinates": coordinates, "normalize": True}
    assert relative_error(louder.merge("kfac", **options), own.merge("kfac", **options)) < 1e-9
    assert (
        relative_error(louder.merge("kfac", coordinates=coordinates), own.merge("kfac", coordinates=coordinates)) > 0.01
    )
    silent = Problem()
    silent.sensitivities[1] = torch.zeros(10, 10)
    assert silent.merge("kfac", **options).isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_eta_is_what_curvatures_that_differ_make_of_the_mean(metric, damping):
    own = Problem()
    s, labelled = own.atoms()
    projected = torch.stack([s.T @ h @ s for h in own.curvatures(metric)])
    projected = projected + damping * projected.mean(0).diagonal().mean() * torch.eye(9, dtype=torch.float64)

    def loss(x):
        return float(sum((x - d) @ h @ (x - d) for h, d in zip(projected, labelled)) / 3)

    best = torch.linalg.solve(projected.mean(0), sum(h @ d for h, d in zip(projected, labelled)) / 3)
    gain = loss(labelled.mean(0)) - loss(best)
    for coordinates in ("labelled", "exact"):
        found = own.diagnose(metric, damping=damping, coordinates=coordinates)
        assert set(found) == {"eta", "share"}
        assert found["eta"] == pytest.approx(gain, rel=1e-9, abs=1e-14)
        assert found["share"] == pytest.approx(gain / loss(labelled.mean(0)), rel=1e-9, abs=1e-12)
    assert gain > 1e-4 if metric != "identity" else abs(gain) < 1e-14


@pytest.mark.parametrize("metric", METRICS)
def test_exact_is_the_least_of_its_metric_in_the_subspace(metric):
    own = Problem()

    def loss(moved):
        errors = [(moved - tau).reshape(-1) for tau in own.taus]
        return float(sum(e @ h @ e for h, e in zip(own.curvatures(metric), errors)))

    least = loss(own.merge(metric, coordinates="exact", damping=0.0))
    scales = [0.1 * n for n in range(1, 16)]
    for rule in (
        lambda a: own.merge(metric, scaling=a),
        lambda a: tsv_m(own.base, own.experts, rank=RANK, scaling=a) - own.base,
    ):
        assert least <= min(loss(rule(a)) for a in scales) * (1 + 1e-12)
    s, _ = own.atoms()
    around = own.merge(metric, coordinates="exact", damping=0.0).reshape(-1)
    for seed in range(5):
        step = s @ torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert least < loss((around + 0.01 * step).reshape(own.base.shape))


def test_shared_directions_count_once():
    own = Problem()
    own.taus = [own.taus[0]] * 3
    u, s, vh = torch.linalg.svd(own.taus[0], full_matrices=False)
    truth = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    for metric in METRICS:
        for coordinates in ("labelled", "exact"):
            assert own.merge(metric, coordinates=coordinates).isfinite().all()
    assert relative_error(own.merge("identity"), truth) < 1e-9
    assert relative_error(own.merge("identity", coordinates="exact"), truth) < 1e-9


def test_grams_may_be_moments_and_task_vectors_products():
    own = Problem()
    moments = [DenseMoment(7 * gram, rows=7) for gram in own.grams]
    assert relative_error(own.merge("kfac", grams=moments), own.merge("kfac")) < 1e-12
    narrow = Problem()
    narrow.taus = [tau[:, :2] @ tau[:2] for tau in own.taus]
    products = [LowRank(tau[:, :2].contiguous(), tau[:2].contiguous()) for tau in own.taus]
    for coordinates in ("labelled", "exact"):
        dense = narrow.merge("fisher", coordinates=coordinates)
        assert relative_error(narrow.merge("fisher", coordinates=coordinates, low_rank=products), dense) < 1e-9


def test_misuse():
    own = Problem()
    with pytest.raises(ConfigError, match=r"tensor: 0 Fisher tensors for 3 experts.*collect --fisher"):
        epimer(own.base, own.experts)
    with pytest.raises(ConfigError, match=r"2 sensitivities for 3 experts"):
        own.merge("kfac", sensitivities=own.sensitivities[:2])
    with pytest.raises(ShapeMismatchError, match=r"expert 1: its Gram is \(8, 8\), the module needs \(14, 14\)"):
        own.merge("gram", grams=[own.grams[0], own.grams[1][:8, :8], own.grams[2]])
    broken = own.fishers[2].clone()
    broken[3, 4] = math.nan
    with pytest.raises(NonFiniteGramError, match="the fisher curvature along its atoms is nan"):
        own.merge("fisher", fishers=[*own.fishers[:2], broken])
    thin = [torch.outer(g[0], g[0]) for g in own.grams]
    with pytest.raises(NotPositiveDefiniteError, match=r"its 9 atoms.*larger `damping`") as caught:
        own.merge("kfac", grams=thin, sensitivities=[torch.outer(s[0], s[0]) for s in own.sensitivities], damping=0.0)
    assert caught.value.module == "tensor"
    with pytest.raises(ConfigError, match="damping = -1"):
        own.merge("fisher", damping=-1)

"""ESM against a float64 oracle that takes SVDs of the outputs' shifts, and its laws."""

from __future__ import annotations

import pytest
import torch

from bmm_engine import GramSet, merge
from bmm_engine.anchors import get_anchor
from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.solving.moments import DenseMoment
from bmm_engine.statistics.grams import GramAccumulator
from tests.numerics import relative_error

esm = get_anchor("esm")


def problem(tasks=3, out=10, width=14, rows=60, seed=0):
    """Base, task vectors of unequal size, and each task's inputs (rows, in), in float64."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    taus = [(0.1 + 0.05 * t) * drawn(out, width) for t in range(tasks)]
    return drawn(out, width), taus, [drawn(rows, width) @ drawn(width, width) for _ in range(tasks)]


def oracle(taus, inputs, spectrum_power=0.15, norm_power=2.0):
    """M: principal components of `X tau^T` by SVD; then what the paper and its public code do with them, in their order."""
    out, width = taus[0].shape
    rank = min(out, width) // len(taus)
    us, vs, norms = [], [], []
    for tau, x in zip(taus, inputs):
        _, s, vh = torch.linalg.svd(x @ tau.T, full_matrices=True)
        values = torch.zeros(out, dtype=torch.float64)
        values[: len(s)] = s.square() / (len(x) - 1)
        directions = vh.T
        projected = directions.T @ tau
        norms.append(projected.norm())
        projected = projected * projected.norm() ** norm_power
        weights = (values[:rank] / values[:rank].mean()) ** spectrum_power
        weights = weights / weights.mean()
        us.append(directions[:, :rank] * weights)
        vs.append(projected[:rank] * weights[:, None])
    u = torch.cat(us, 1)
    v = torch.cat(vs) / torch.stack(norms).mean() ** norm_power
    columns = v.norm(dim=0)
    v = v * (columns / columns.mean()) ** norm_power
    factors = []
    for stacked in (u, v):
        a, s, b = torch.linalg.svd(stacked, full_matrices=False)
        factors.append(a @ b * s.mean())
    return 2 * factors[0] @ factors[1]


def grams_of(inputs):
    return [x.T @ x / len(x) for x in inputs]


@pytest.mark.parametrize(("tasks", "out", "width"), [(3, 10, 14), (2, 15, 8), (4, 8, 8), (1, 5, 6), (1, 7, 5)])
def test_matches_its_formula(tasks, out, width):
    base, taus, inputs = problem(tasks, out, width)
    experts = [base + tau for tau in taus]
    for options in ({}, {"spectrum_power": 0.5, "norm_power": 1.0}, {"spectrum_power": 0.0, "norm_power": 0.0}):
        merged = esm(base, experts, grams=grams_of(inputs), scaling=-0.7, **options)
        assert relative_error(merged - base, -0.7 * oracle(taus, inputs, **options)) < 1e-9, options


def test_modules_are_scaled_by_their_norm_within_their_role():
    """The same module of every layer is one role; what is no measured module moves by the mean task vector."""
    shapes = {
        "embed.weight": (9, 6),
        "layers.0.up.weight": (8, 6),
        "layers.1.up.weight": (8, 6),
        "layers.0.down.weight": (6, 8),
    }
    base, taus, inputs = {"norm": torch.zeros(5).double()}, {"norm": [torch.ones(5).double()] * 2}, {}
    for seed, (name, shape) in enumerate(shapes.items()):
        base[name], own, (inputs[name], _) = problem(2, *shape, seed=seed)
        taus[name] = [(seed + 1) * tau for tau in own]
    del inputs["embed.weight"]
    experts = [{name: base[name] + taus[name][t] for name in base} for t in range(2)]
    sets = []
    for _ in experts:
        grams = {
            n.removesuffix(".weight"): GramAccumulator(x.shape[1], dtype=x.dtype).update(x) for n, x in inputs.items()
        }
        sets.append(GramSet(grams, {name: name for name in grams}))
    result = merge(base, experts, anchor="esm", grams=sets, alpha=float("inf"), anchor_parameters={"scaling": 0.5})
    moved = {name: result.tensors[name] - base[name] for name in base}
    truth = {name: oracle(taus[name], [x] * 2) for name, x in inputs.items()}
    norms = {name: float(m.norm()) for name, m in truth.items()}
    up = (norms["layers.0.up.weight"] + norms["layers.1.up.weight"]) / 2
    scales = {name: (norm / up) ** 2 if "up" in name else 1.0 for name, norm in norms.items()}
    for name, m in truth.items():
        assert relative_error(moved[name], 0.5 * scales[name] * m) < 1e-9, name
        assert result.diagnostics[name] == {"layer_scale": pytest.approx(scales[name], rel=1e-9)}
    for name in ("embed.weight", "norm"):
        assert relative_error(moved[name], 0.5 * sum(taus[name]) / 2) < 1e-9
    assert set(result.diagnostics) == set(truth)
    assert max(scales.values()) > 1.2


def test_neither_order_nor_units_matter_and_outputs_may_be_turned():
    base, taus, inputs = problem()
    experts = [base + tau for tau in taus]
    grams = grams_of(inputs)
    move = esm(base, experts, grams=grams) - base
    assert relative_error(esm(base, experts[::-1], grams=grams[::-1]) - base, move) < 1e-9
    assert (
        relative_error(esm(base, experts, grams=[g * u for g, u in zip(grams, (1e-20, 3.0, 1e15))]) - base, move) < 1e-9
    )
    small = esm(base / 8, [e / 8 for e in experts], grams=grams) - base / 8
    assert relative_error(8 * small, move) < 1e-9
    turn = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    turned = esm(turn @ base, [turn @ e for e in experts], grams=grams) - turn @ base
    assert relative_error(turned, turn @ move) < 1e-9


def test_few_rows_leave_directions_without_weight():
    base, taus, inputs = problem(2, 12, 12, rows=3)  # r = 6, of which 3 directions are seen
    experts = [base + tau for tau in taus]
    move = esm(base, experts, grams=grams_of(inputs)) - base
    assert int(torch.linalg.matrix_rank(move, rtol=1e-9)) == 6
    u, _, _ = torch.linalg.svd(torch.cat([tau @ x.T for tau, x in zip(taus, inputs)], 1))
    assert relative_error(u[:, :6] @ u[:, :6].T @ move, move) < 1e-9  # nothing but what was seen to move


def test_what_does_not_move_adds_nothing():
    base, taus, inputs = problem()
    grams = grams_of(inputs)
    assert torch.equal(esm(base, [base] * 3, grams=grams), base)
    assert torch.equal(esm(base, [base + t for t in taus], grams=[0 * g for g in grams]), base)
    some = esm(base, [base + taus[0], base, base + taus[2]], grams=grams)
    assert some.isfinite().all()
    five = [base[:4] + t[:4] for t in (*taus, *taus[:2])]
    assert torch.equal(esm(base[:4], five, grams=[grams[0]] * 5), base[:4])


def test_grams_may_be_moments():
    base, taus, inputs = problem()
    experts = [base + tau for tau in taus]
    moments = [DenseMoment(x.T @ x, rows=len(x)) for x in inputs]
    assert relative_error(esm(base, experts, grams=moments), esm(base, experts, grams=grams_of(inputs))) < 1e-12


def test_misuse():
    base, taus, inputs = problem()
    experts, grams = [base + tau for tau in taus], grams_of(inputs)
    with pytest.raises(ConfigError, match="2 Grams for 3 experts"):
        esm(base, experts, grams=grams[:2])
    with pytest.raises(ShapeMismatchError, match=r"expert 2: its Gram is \(3, 3\), the module needs \(14, 14\)"):
        esm(base, experts, grams=[*grams[:2], grams[2][:3, :3]])
    with pytest.raises(ConfigError, match="norm_power = inf"):
        esm(base, experts, grams=grams, norm_power=float("inf"))

"""Calibrations: each is its formula, written out here in float64, and obeys its laws."""

from __future__ import annotations

import math

import pytest
import torch

from bmm_engine.anchors.calibration import AFTER
from bmm_engine.anchors.calibration.larv import Diagnosis, diagnose, layer_scales
from bmm_engine.anchors.calibration.subspace_boost import subspace_boost
from bmm_engine.anchors.calibration.svc import svc

SHAPES = [(12, 7), (7, 12), (9, 9), (1, 5), (5, 1)]


def taus_of(shape, tasks=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(tasks)]


def svc_oracle(delta, taus, floor):
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    out = torch.zeros_like(delta)
    for r in range(len(s)):
        whole = u[:, r] @ delta
        counts = []
        for tau in taus:
            part = u[:, r] @ tau
            counts.append(max(float(whole @ part / (part @ part)), floor))
        out += len(taus) / sum(counts) * s[r] * torch.outer(u[:, r], vh[r])
    return out


def boost_oracle(delta, share):
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    k = next(k for k in range(len(s)) if s[: k + 1].sum() >= share * s.sum())
    raised = torch.tensor([max(float(value), float(s[k])) for value in s], dtype=torch.float64)
    return u @ raised.diag() @ vh


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("floor", [0.1, 0.5, 1.0])
def test_svc_is_its_formula(shape, floor):
    taus = taus_of(shape)
    for delta in (sum(taus), sum(taus) / 3, 0.7 * taus[0] - 0.4 * taus[2]):
        torch.testing.assert_close(svc(delta, taus, floor=floor), svc_oracle(delta, taus, floor), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.01, 0.4, 0.9, 1.0])
def test_subspace_boost_is_its_formula(shape, share):
    delta = sum(taus_of(shape))
    torch.testing.assert_close(
        subspace_boost(delta, [], share=share), boost_oracle(delta, share), rtol=1e-9, atol=1e-11
    )


def test_svc_gives_equal_experts_their_task_vector_whatever_multiple_of_it_the_rule_makes():
    tau = taus_of((6, 9), 1)[0]
    for tasks in (1, 4):
        for multiple in (0.1, 1.0, 4.0):
            torch.testing.assert_close(svc(multiple * tau, [tau] * tasks), tau, rtol=1e-9, atol=1e-11)
    # Below the floor it is enlarged as far as the floor allows.
    torch.testing.assert_close(svc(0.05 * tau, [tau]), 0.5 * tau, rtol=1e-9, atol=1e-11)


def test_svc_divides_what_is_shared_and_leaves_what_is_a_tasks_own():
    u, _ = torch.linalg.qr(taus_of((8, 8), 1)[0])
    shared = 2.0 * torch.outer(u[:, 0], u[:, 4])
    own = [torch.outer(u[:, t], u[:, t + 4]) for t in (1, 2)]
    found = svc(sum(own) + 2 * shared, [part + shared for part in own], floor=1.0)
    torch.testing.assert_close(found, sum(own) + shared, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", AFTER)
def test_zero_merges_and_zero_task_vectors(name):
    calibrate = AFTER[name]
    zero, taus = torch.zeros(5, 6, dtype=torch.float64), taus_of((5, 6), 2)
    assert torch.equal(calibrate(zero, taus), zero)
    assert torch.equal(calibrate(zero, [zero]), zero)
    delta = sum(taus)
    torch.testing.assert_close(calibrate(delta, [*taus, zero]), calibrate(delta, taus), rtol=1e-9, atol=1e-11)
    kept = [t.clone() for t in (delta, *taus)]
    calibrate(delta, taus)
    assert all(torch.equal(a, b) for a, b in zip(kept, (delta, *taus)))


@pytest.mark.parametrize("name", AFTER)
def test_the_order_of_the_experts_does_not_matter(name):
    taus = taus_of((6, 8), 4)
    delta = taus[0] + 0.3 * taus[2]
    torch.testing.assert_close(AFTER[name](delta, taus), AFTER[name](delta, taus[::-1]), rtol=1e-12, atol=1e-12)


def test_svc_on_directions_that_an_expert_lacks():
    """Of rank 1 each, and orthogonal: what rounding leaves along the other's direction counts as nothing."""
    u, _ = torch.linalg.qr(taus_of((8, 8), 1)[0])
    taus = [torch.outer(u[:, t], u[:, t + 4]) for t in (0, 1)]
    expected = 2 * (taus[0] / (1 + 0.1) + 1.5 * taus[1] / (1.5 + 0.1))
    torch.testing.assert_close(svc(taus[0] + 1.5 * taus[1], taus), expected, rtol=1e-9, atol=1e-11)


def test_subspace_boost_makes_up_no_directions_and_boosts_once():
    left, right = taus_of((9, 2), 1)[0], taus_of((2, 7), 1)[0]
    boosted = subspace_boost(left @ right, [])
    assert int(torch.linalg.matrix_rank(boosted)) == 2
    values = torch.linalg.svdvals(boosted)
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-9)
    torch.testing.assert_close(subspace_boost(boosted, []), boosted, rtol=1e-9, atol=1e-11)


def effective_rank(matrix):
    p = torch.linalg.svdvals(matrix) ** 2 / matrix.square().sum()
    return math.exp(-sum(float(q) * math.log(float(q)) for q in p if q > 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_larv_diagnoses_a_task_vector_by_its_formulas(shape):
    base, tau = taus_of(shape, 2)
    found = diagnose(base, tau)
    both = (base @ tau.T - tau @ base.T).norm() + (base.T @ tau - tau.T @ base).norm()
    assert found.contrast == pytest.approx(effective_rank(base) / effective_rank(tau), rel=1e-9)
    assert found.conflict == pytest.approx(float(both / 2 / base.norm() / tau.norm()), rel=1e-9, abs=1e-7)
    scaled = diagnose(3 * base, 0.01 * tau)
    assert (scaled.contrast, scaled.conflict) == pytest.approx((found.contrast, found.conflict), rel=1e-9, abs=1e-7)
    # A multiple of a base commutes with it and has its spectrum. Rounding is magnified by the root in the larger half.
    alike = diagnose(base, 0.3 * base)
    assert alike.contrast == pytest.approx(1, rel=1e-9)
    assert alike.conflict < 1e-7
    assert diagnose(base, 0 * tau) is None is diagnose(0 * base, tau)


def test_larv_scores_layers_and_sorts_them_into_thirds():
    generator = torch.Generator().manual_seed(2)
    numbers = torch.rand(2, 7, 3, generator=generator, dtype=torch.float64).tolist()
    layers = [("encoder.", n, 4) for n in range(4)] + [("decoder.", n, 3) for n in range(3)]
    found = {
        layer: [Diagnosis(1 + e, c) for e, c in zip(numbers[0][i], numbers[1][i], strict=True)]
        for i, layer in enumerate(layers)
    }
    contrast = torch.tensor(numbers[0], dtype=torch.float64).mean(1) + 1
    conflict = torch.tensor(numbers[1], dtype=torch.float64).mean(1)
    z = (conflict - conflict.mean()) / conflict.std(correction=0)
    depth = torch.tensor([(n + 1) / count for _, n, count in layers], dtype=torch.float64)
    score = contrast * depth.sqrt() / (1 + torch.nn.functional.softplus(z))
    tiers = dict(zip(score.argsort().tolist(), [0.8, 0.8, 1.0, 1.0, 1.0, 1.2, 1.2], strict=True))
    expected = {layer: tiers[i] for i, layer in enumerate(layers)}
    assert layer_scales(found) == expected
    assert layer_scales({layer: own[::-1] for layer, own in reversed(found.items())}) == expected


def test_larv_of_few_layers_and_of_layers_without_a_task_vector():
    one = [Diagnosis(1.5, 0.2)]
    assert layer_scales({}) == {} == layer_scales({("", 0, 2): []})
    assert layer_scales({("", 0, 1): one}) == {("", 0, 1): 1.0}
    # All else equal the shallow layer is damped and the deep one enlarged; a layer that nobody changed takes no part.
    found = layer_scales({("", 0, 3): one, ("", 1, 3): [], ("", 2, 3): one})
    assert found == {("", 0, 3): 0.8, ("", 2, 3): 1.2}

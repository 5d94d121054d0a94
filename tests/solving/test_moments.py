from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import ConfigError, NonFiniteGramError, ShapeMismatchError
from bmm_engine.ops.lowrank import LowRank
from bmm_engine.solving.moments import DenseMoment, SumMoment, TaskVectorMoment, alignment, energy_factor, hybrid_moment
from bmm_engine.solving.task_weights import task_energy


def dense(moment):
    matrix = torch.zeros(moment.width, moment.width, dtype=torch.float64)
    moment.add_to(matrix, 1.0)
    return matrix


def moments():
    x, u, tall = torch.randn(30, 9), torch.randn(4, 9), torch.randn(20, 9)
    data = DenseMoment(x.T @ x, 30)
    return {
        "dense": (data, x.double().T @ x.double() / 30),
        "lazy": (DenseMoment(lambda: x.T @ x, 30, width=9), x.double().T @ x.double() / 30),
        "task_vector": (TaskVectorMoment(u), u.double().T @ u.double() / u.double().pow(2).sum()),
        "tall": (TaskVectorMoment(tall), tall.double().T @ tall.double() / tall.double().pow(2).sum()),
        "plain": (TaskVectorMoment(u, "none"), u.double().T @ u.double()),
        "sum": (
            SumMoment([(0.5, data), (2.0, TaskVectorMoment(u))]),
            x.double().T @ x.double() / 60 + 2 * u.double().T @ u.double() / u.double().pow(2).sum(),
        ),
    }


@pytest.mark.parametrize("kind", ["dense", "lazy", "task_vector", "tall", "plain", "sum"])
def test_add_apply_and_trace_are_one_matrix(kind):
    moment, truth = moments()[kind]
    rows = torch.randn(5, 9, dtype=torch.float64)
    assert moment.width == 9
    torch.testing.assert_close(dense(moment), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moment.apply(rows), rows @ truth, rtol=1e-6, atol=1e-6)
    assert moment.trace() == pytest.approx(float(truth.trace()), rel=1e-6)
    start = torch.randn(9, 9, dtype=torch.float64)
    start = start + start.T
    summed = start.clone()
    moment.add_to(summed, 0.25)
    torch.testing.assert_close(summed, start + 0.25 * truth, rtol=1e-6, atol=1e-6)


def test_more_than_a_block(monkeypatch):
    monkeypatch.setattr("bmm_engine.solving.moments.BLOCK", 3)
    rows = torch.randn(5, 9, dtype=torch.float64)
    for moment, truth in moments().values():
        torch.testing.assert_close(moment.apply(rows), rows @ truth, rtol=1e-6, atol=1e-6)


def test_zero_task_vector_is_a_zero_moment():
    moment = TaskVectorMoment(torch.zeros(3, 5))
    assert not dense(moment).any()
    assert moment.trace() == 0


@given(share=st.floats(0, 1))
def test_hybrid_has_trace_one_and_its_ends(share):
    torch.manual_seed(3)
    x, u = torch.randn(30, 6), torch.randn(4, 6)
    moment = hybrid_moment(DenseMoment(x.T @ x, 30), u, share)
    assert moment.trace() == pytest.approx(1)
    gram = (x.T @ x).double()
    truth = (1 - share) * gram / gram.trace() + share * u.double().T @ u.double() / u.double().pow(2).sum()
    torch.testing.assert_close(dense(moment), truth, rtol=1e-5, atol=1e-6)


def test_alignment_is_the_cosine():
    u = torch.randn(4, 6)
    assert alignment(DenseMoment(3 * u.T @ u), u) == pytest.approx(1, abs=1e-6)
    x = torch.randn(50, 6)
    gram, outer = (x.T @ x).double(), u.double().T @ u.double()
    assert alignment(DenseMoment(x.T @ x), u) == pytest.approx(float((gram * outer).sum() / gram.norm() / outer.norm()))
    assert math.isnan(alignment(DenseMoment(x.T @ x), torch.zeros(4, 6)))


@pytest.mark.parametrize(("out", "width", "rank"), [(20, 9, 3), (5, 30, 2), (4, 9, 4), (9, 4, 6)])
@pytest.mark.parametrize("normalization", ["trace", "none"])
def test_low_rank_task_vector_is_the_dense_one(out, width, rank, normalization):
    u = LowRank(torch.randn(out, rank, dtype=torch.float64), torch.randn(rank, width, dtype=torch.float64))
    ours, truth = TaskVectorMoment(u, normalization), TaskVectorMoment(u.left @ u.right, normalization)
    rows = torch.randn(5, width, dtype=torch.float64)
    assert ours.width == width
    assert ours.trace() == pytest.approx(truth.trace())
    torch.testing.assert_close(dense(ours), dense(truth))
    torch.testing.assert_close(ours.apply(rows), truth.apply(rows))
    x = torch.randn(50, width, dtype=torch.float64)
    data = DenseMoment(x.T @ x, 50)
    torch.testing.assert_close(dense(hybrid_moment(data, u, 0.3)), dense(hybrid_moment(data, u.left @ u.right, 0.3)))
    assert alignment(data, u) == pytest.approx(alignment(data, u.left @ u.right))
    assert task_energy(data, energy_factor(u)) == pytest.approx(task_energy(data, u.left @ u.right))


def test_low_rank_task_vector_stays_factored(monkeypatch):
    u = LowRank(torch.randn(30, 2), torch.randn(2, 30))
    assert energy_factor(u).shape == (2, 30)
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("made the matrix"))
    moment = TaskVectorMoment(u)
    assert moment.apply(torch.randn(3, 30)).shape == (3, 30)
    assert torch.linalg.matrix_rank(dense(moment)) == 2


def test_errors():
    with pytest.raises(ShapeMismatchError, match=r"m: .*\(2, 3\)"):
        DenseMoment(torch.zeros(2, 3), module="m").trace()
    with pytest.raises(NonFiniteGramError, match=r"m: .*1 entries"):
        DenseMoment(torch.tensor([[math.nan]]), module="m").trace()
    with pytest.raises(ConfigError, match="'trance'"):
        TaskVectorMoment(torch.zeros(2, 3), "trance")
    with pytest.raises(ConfigError, match=r"1\.5"):
        hybrid_moment(DenseMoment(torch.eye(2)), torch.zeros(2, 2), 1.5)

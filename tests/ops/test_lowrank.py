from __future__ import annotations

import pytest
import torch

from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.ops.lowrank import LowRank

# (out, in, r): tall, wide, square, rank 1, more columns than the matrix has rows, than it has either way
SHAPES = [(40, 9, 3), (9, 40, 3), (12, 12, 4), (7, 5, 1), (3, 20, 6), (4, 5, 8)]


def make(out, width, rank, dtype=torch.float64):
    return LowRank(torch.randn(out, rank, dtype=dtype), torch.randn(rank, width, dtype=dtype))


def truth(matrix):
    return matrix.left.double() @ matrix.right.double()


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_give_what_the_matrix_gives(shape):
    matrix = make(*shape)
    dense = truth(matrix)
    assert (matrix.shape, matrix.rank) == (dense.shape, shape[2])
    torch.testing.assert_close(matrix.dense(), dense)
    torch.testing.assert_close(matrix.dense(slice(1, 3)), dense[1:3])
    torch.testing.assert_close(matrix.mT.dense(), dense.mT)
    torch.testing.assert_close(matrix.scale(-2.5).dense(), -2.5 * dense)
    assert matrix.norm() == pytest.approx(float(dense.norm()))
    factor = matrix.gram_factor()
    assert factor.shape == (min(shape[0], shape[2]), shape[1])
    torch.testing.assert_close(factor.mT @ factor, dense.mT @ dense)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd(shape):
    matrix = make(*shape)
    u, s, vh = matrix.svd()
    count = min(shape)
    assert (u.shape, s.shape, vh.shape) == ((shape[0], count), (count,), (count, shape[1]))
    torch.testing.assert_close((u * s) @ vh, truth(matrix))
    torch.testing.assert_close(s, torch.linalg.svdvals(truth(matrix))[:count])
    torch.testing.assert_close(u.mT @ u, torch.eye(count, dtype=torch.float64))
    torch.testing.assert_close(vh @ vh.mT, torch.eye(count, dtype=torch.float64))


def test_without_full_rank_and_badly_scaled():
    """Equal columns, a zero one, and columns 10^8 apart: squaring `left` first would lose the small ones."""
    left = torch.randn(30, 4, dtype=torch.float64) * torch.tensor([1e8, 1e8, 0, 1e-4], dtype=torch.float64)
    left[:, 1] = left[:, 0]
    right = torch.randn(4, 11, dtype=torch.float64)
    right[:2] = torch.stack([right[0], -right[0]])  # the large ones cancel
    matrix = LowRank(left, right)
    dense = left[:, 3:] @ right[3:]
    factor = matrix.gram_factor()
    torch.testing.assert_close(factor.mT @ factor, dense.mT @ dense, rtol=1e-3, atol=1e-3 * float(dense.norm()) ** 2)
    assert not LowRank(torch.zeros(5, 2), torch.zeros(2, 3)).gram_factor().any()
    assert LowRank(torch.zeros(5, 2), torch.zeros(2, 3)).norm() == 0


def test_added_and_rounded_once(monkeypatch):
    matrix = make(50, 33, 8, torch.float32)
    base = torch.randn(50, 33)
    exact = (base.double() + truth(matrix)).float()
    for out in (base.clone(), base.mT.contiguous().mT):
        assert matrix.add_to(out) is out
        assert torch.equal(out, exact)
    monkeypatch.setattr("bmm_engine.ops.lowrank.BLOCK_ELEMENTS", 70)  # two rows at a time
    assert torch.equal(matrix.add_to(base.clone()), exact)
    half = base.bfloat16()
    assert torch.equal(matrix.add_to(half.clone()), (half.double() + truth(matrix)).bfloat16())
    assert matrix.dense().dtype == torch.float32
    assert matrix.to(dtype=torch.float64).dense().dtype == torch.float64


def test_what_does_not_fit():
    with pytest.raises(ShapeMismatchError, match=r"left \(3, 2\) and right \(3, 4\)"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ConfigError, match=r"bfloat16 and torch\.bfloat16"):
        LowRank(torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16))

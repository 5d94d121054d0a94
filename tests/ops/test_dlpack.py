"""Arrays of other libraries share their memory with the ops: NumPy stands for all here, CuPy on hardware."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bmm_engine import accumulate_gram, assemble, solve_map
from bmm_engine.errors import ConfigError
from bmm_engine.ops.cholesky import cholesky_
from bmm_engine.ops.residual import residual

rng = np.random.default_rng(0)


def spd(n):
    x = rng.standard_normal((3 * n, n)).astype(np.float32)
    return x.T @ x / (3 * n)


def test_rows_are_added_to_the_callers_own_memory():
    G, X = np.zeros((5, 5), dtype=np.float32), rng.standard_normal((20, 5)).astype(np.float32)
    address = G.ctypes.data
    assert accumulate_gram(G, X) is G, "the caller's object comes back"
    assert G.ctypes.data == address
    np.testing.assert_allclose(G, X.T @ X, rtol=1e-5)


def test_lists_and_keywords():
    grams, out = [spd(4), spd(4)], np.zeros((4, 4), dtype=np.float32)
    assert assemble(grams, [1, 2], 0.5, out=out) is out
    np.testing.assert_allclose(out, grams[0] + 2 * grams[1] + 0.5 * np.eye(4), rtol=1e-5)


def test_mixed_with_tensors_and_a_new_result():
    anchor, expert, gram = torch.randn(3, 4), rng.standard_normal((3, 4)).astype(np.float32), spd(4)
    result = residual(anchor, [expert], [gram], [2.0])
    assert isinstance(result, torch.Tensor)
    np.testing.assert_allclose(result, 2 * (expert - anchor.numpy()) @ gram, rtol=1e-4, atol=1e-5)
    solved = solve_map(anchor, [expert], [gram], alpha=0.1)
    torch.testing.assert_close(
        solved.weight, solve_map(anchor, [torch.from_numpy(expert)], [torch.from_numpy(gram)], alpha=0.1).weight
    )


def test_read_only_memory_may_be_read_but_not_written():
    G, X = np.zeros((5, 5), dtype=np.float32), rng.standard_normal((20, 5)).astype(np.float32)
    X.flags.writeable = False
    accumulate_gram(G, X)
    np.testing.assert_allclose(G, X.T @ X, rtol=1e-5)
    before = G.copy()
    G.flags.writeable = False
    with pytest.raises(ConfigError, match=r"G is a read-only numpy\.ndarray"):
        accumulate_gram(G, X)
    np.testing.assert_array_equal(G, before)


def test_a_factorisation_in_place_needs_writable_memory():
    a = spd(4)
    a.flags.writeable = False
    with pytest.raises(ConfigError, match="a is a read-only"):
        cholesky_(a)


def test_memory_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match=r"X: this numpy\.ndarray cannot be shared"):
        accumulate_gram(torch.zeros(5, 5), np.array([["a"] * 5]))


@pytest.mark.gpu
def test_cupy_arrays_on_their_device():
    cupy = pytest.importorskip("cupy")
    G, X = cupy.zeros((70, 70), dtype=cupy.float32), cupy.random.standard_normal((200, 70), dtype=cupy.float32)
    assert accumulate_gram(G, X) is G
    cupy.testing.assert_allclose(G, X.T @ X, rtol=1e-4, atol=1e-3)

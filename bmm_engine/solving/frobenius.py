"""Frobenius norms in float64, by blocks of rows, the same to the bit whatever the number of threads."""

from __future__ import annotations

import math

from torch import Tensor

from bmm_engine.parallel import one_thread
from bmm_engine.solving.moments import BLOCK_ROWS


def squared_norm(matrix: Tensor) -> float:
    """`||M||_F^2` (rows, columns): the trace of `M M^T`."""
    with one_thread():  # a sum of all elements is cut by threads
        return sum(float(rows.double().square().sum()) for rows in matrix.split(BLOCK_ROWS))


def matrix_norm(matrix: Tensor) -> float:
    """`||M||_F`."""
    return math.sqrt(squared_norm(matrix))

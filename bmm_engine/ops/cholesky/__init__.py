"""Cholesky factors of a batch of symmetric matrices, and solves with them. On torch (LAPACK on the CPU, cuSOLVER on the GPU)."""

from bmm_engine.ops.cholesky.reference import cholesky_, solve_right

__all__ = ["cholesky_", "solve_right"]

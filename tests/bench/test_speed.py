"""Times of every op on a small shape, by pytest-benchmark, to be compared from commit to commit:

    pytest tests/bench/test_speed.py --benchmark-autosave
    pytest tests/bench/test_speed.py --benchmark-compare --benchmark-compare-fail=median:30%

What an op is worth on real shapes and beside its rivals is told by `python -m bench`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import assemble, blend, cholesky, cross_gram, gram, ranks, regmean, residual, select, spectral
from bench.harness import Case

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CPU = torch.device("cpu")

CASES: dict[str, Callable[[], Case]] = {
    "gram float32": lambda: gram.case(CPU, "", 512, 384, F32),
    "gram bfloat16": lambda: gram.case(CPU, "", 512, 384, BF16),
    "gram, one short batch": lambda: gram.case(CPU, "", 64, 384, F32),
    "grams, grouped": lambda: gram.grouped_case(CPU, "", 4, 128, 256, F32),
    "cross_gram": lambda: cross_gram.case(CPU, "", 512, 384, F32),
    "assemble": lambda: assemble.case(CPU, "", 8, 384, F32, F64),
    "residual to float32": lambda: residual.case(CPU, "", 4, 384, 384, BF16),
    "residual to float64": lambda: residual.case(CPU, "", 4, 384, 384, BF16, F32, F64),
    "spectral": lambda: spectral.case(CPU, "", 1, [(384, 384)], F32),
    "select": lambda: select.case(CPU, "", 1 << 20, F32),
    "blend": lambda: blend.case(CPU, "", "TIES", 4, 1 << 18, BF16),
    "ranks": lambda: ranks.case(CPU, "", 64, 4096, F32),
    "cholesky": lambda: cholesky.case(CPU, "", 2, 256, 256, F64),
    "regmean": lambda: regmean.case(CPU, "", 256, 256, 2, 512, 128, F32, "float64"),
}


@pytest.mark.parametrize("name", CASES)
def test_speed(name, benchmark):
    case = CASES[name]()
    case.reset()
    case.gate.assert_right(case.gate.part(case.ours("auto")))
    benchmark.pedantic(case.ours, args=("auto",), rounds=7, warmup_rounds=1)
    assert len(benchmark.stats.stats.data) == 7

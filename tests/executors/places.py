"""What holds of jobs wherever they run."""

from __future__ import annotations

import torch

from bmm_engine.executors import Executor, open_executor, run_all
from tests.executors import jobs


def assert_same_results_as_here(executor: Executor, calls: int) -> list[dict]:
    """Results and their order, to the last bit; returns them. The executor keeps the factor 3 as its state."""
    torch.set_num_threads(1)
    found = []
    for place in (open_executor(), executor):
        place.start(jobs.keep_info, 3)
        found.append(run_all(place, jobs.arithmetic, [(seed,) for seed in range(calls)]))
    for here, there in zip(*found, strict=True):
        assert here.pop("seed") == there.pop("seed")
        for name in here:
            assert here[name].dtype == there[name].dtype
            torch.testing.assert_close(here[name], there[name], rtol=0, atol=0)
    return found[1]

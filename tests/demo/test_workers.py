from __future__ import annotations

import os
from functools import partial

import pytest
import torch

from bmm_engine.demo.workers import run_jobs
from bmm_engine.errors import TrainingError


@pytest.mark.parametrize("workers", [0, 2])
def test_each_job_runs_on_one_thread_and_is_heard(workers: int) -> None:
    before, heard = torch.get_num_threads(), []
    run_jobs({name: torch.get_num_threads for name in "abc"}, workers, heard.append)
    assert heard == [1, 1, 1]
    assert torch.get_num_threads() == before


def test_a_process_that_dies_is_named() -> None:
    with pytest.raises(TrainingError, match="the process training the expert for x died, perhaps for lack of memory"):
        run_jobs({"x": partial(os._exit, 1)}, 1, print)


def test_an_error_in_a_worker_is_named() -> None:
    with pytest.raises(TrainingError, match="the expert for x failed: ZeroDivisionError"):
        run_jobs({"x": partial(divmod, 1, 0)}, 1, print)


def test_who_listens_may_stop_it() -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs({name: os.getpid for name in "abcdef"}, 1, stop)

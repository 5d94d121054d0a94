from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path

import pytest
import torch

from bmm_engine.demo.board import Board, Reading
from bmm_engine.demo.workers import run_jobs
from bmm_engine.errors import TrainingError
from bmm_engine.progress import heard_by
from tests.demo.jobs import die_on_the_way, fail_on_the_way, leave


class Ear:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int | None]] = []
        self.ended: list[str] = []

    def step(self, label: str, done: int, total: int | None) -> None:
        self.steps.append((label, done, total))

    def end(self, label: str) -> None:
        self.ended.append(label)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_job_runs_on_one_thread_and_is_heard(workers: int) -> None:
    before, heard = torch.get_num_threads(), []
    run_jobs({name: torch.get_num_threads for name in "abc"}, workers, heard.append)
    assert heard == [1, 1, 1]
    assert torch.get_num_threads() == before


def test_a_process_that_dies_is_named() -> None:
    ear, message = Ear(), "the process training the expert for x died, perhaps for lack of memory"
    with heard_by(ear), pytest.raises(TrainingError, match=message):
        run_jobs({"x": partial(die_on_the_way, "job x")}, 1, print)
    assert ("job x", 1, 3) in ear.steps


def test_an_error_in_a_worker_is_named() -> None:
    ear = Ear()
    with heard_by(ear), pytest.raises(TrainingError, match="the expert for x failed: ZeroDivisionError"):
        run_jobs({"x": partial(fail_on_the_way, "job x")}, 1, print)
    assert ("job x", 1, 3) in ear.steps


def test_who_listens_may_stop_it(tmp_path: Path) -> None:
    """What runs comes to its end; nothing else begins."""

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    jobs = {name: partial(leave, tmp_path / name, 0.5) for name in "abcdef"}
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, 1, stop)
    assert {"a"} <= {path.name for path in tmp_path.iterdir()} <= {"a", "b"}


def test_a_board_shows_what_is_under_way() -> None:
    board, ear = Board(2, multiprocessing.get_context("spawn")), Ear()
    reading = Reading(board, ear)
    reading.look()
    assert not ear.steps
    long = "é" * 200
    board.writer(0).step("first", 3, None)
    board.writer(1).step(long, 1, 7)
    reading.look()
    (first, second) = ear.steps
    assert first == ("first", 3, None)
    assert long.startswith(second[0][:70])
    board.writer(0).end("first")
    reading.look()
    assert ear.ended == ["first"]

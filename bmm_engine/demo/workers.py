"""Experts are trained on one thread each, several at a time: on more threads sums come in another order, and so another expert."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from bmm_engine.demo.board import Board, Reading
from bmm_engine.errors import BmmError, TrainingError
from bmm_engine.progress import heard_by, listening

T = TypeVar("T")
LOOK_S = 0.2  # between two looks at how far the workers are, where somebody listens


def run_jobs(jobs: Mapping[str, Callable[[], T]], workers: int, on_ready: Callable[[T], object]) -> None:
    """`on_ready` hears what each job returns, as it ends. `jobs`: by the expert's name; with workers, they and what they return are pickled.

    In `workers` spawned processes; one after the other in this one if `workers` is 0, or if it is a daemon, which may not have children.
    Who listens (`progress.heard_by`) hears what the jobs track.

    Raises `TrainingError`, naming the expert, where a worker dies or a job in it raises what is no error of the engine's own.
    """
    if workers == 0 or multiprocessing.current_process().daemon:
        threads = torch.get_num_threads()
        _on_one_thread()
        try:
            for job in jobs.values():
                on_ready(job())
        finally:
            torch.set_num_threads(threads)
    elif jobs:
        context = multiprocessing.get_context("spawn")
        board, listener = Board(len(jobs), context), listening()
        reading = None if listener is None else Reading(board, listener)
        with ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (board,)) as pool:
            names = {pool.submit(_told, number, job): name for number, (name, job) in enumerate(jobs.items())}
            running = set(names)
            try:
                while running:
                    ended, running = wait(running, LOOK_S if reading else None, FIRST_COMPLETED)
                    if reading:
                        reading.look()
                    for future in ended:
                        on_ready(_outcome(names[future], future.result))
            except BaseException:
                board.close()  # a pool has handed out more jobs than run, and does not take them back
                pool.shutdown(wait=False, cancel_futures=True)
                raise


_board: Board  # of a worker's process


def _begin(board: Board) -> None:
    global _board
    _board = board
    _on_one_thread()


def _told(number: int, job: Callable[[], T]) -> T:
    if _board.closed:
        raise CancelledError
    with heard_by(_board.writer(number)):
        return job()


def _on_one_thread() -> None:
    torch.set_num_threads(1)


def _outcome(name: str, result: Callable[[], T]) -> T:
    try:
        return result()
    except BmmError:
        raise
    except BrokenProcessPool as error:
        raise TrainingError(
            f"the process training the expert for {name} died, perhaps for lack of memory; try fewer workers"
        ) from error
    except Exception as error:
        raise TrainingError(f"training the expert for {name} failed: {type(error).__name__}: {error}") from error

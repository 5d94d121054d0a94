"""Experts are trained on one thread each, several at a time: on more threads sums come in another order, and so another expert."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

import torch

from bmm_engine.errors import BmmError, TrainingError

T = TypeVar("T")


def run_jobs(jobs: Mapping[str, Callable[[], T]], workers: int, on_ready: Callable[[T], object]) -> None:
    """`on_ready` hears what each job returns, as it ends. `jobs`: by the expert's name; with workers, they and what they return are pickled.

    In `workers` spawned processes; one after the other in this one if `workers` is 0, or if it is a daemon, which may not have children.
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
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_on_one_thread) as pool:
            names = {pool.submit(job): name for name, job in jobs.items()}
            try:
                for future in as_completed(names):
                    on_ready(_outcome(names[future], future.result))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


_on_one_thread = partial(torch.set_num_threads, 1)


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

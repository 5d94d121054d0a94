"""Several pieces of work at a time, results in order: while one is read, another is computed and a third written.

Every worker runs torch on one thread, so no sum or factorisation depends on how many threads there are; the cores are kept busy by the number
of pieces instead.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

# What the pieces at work may hold together; one piece is always let in, however large.
IN_FLIGHT_BYTES = 512 * 2**20


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, for sums and factorisations whose bits must not depend on the thread count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share_of_memory() -> int:
    """Bytes that factorisations of large matrices may hold together: an eighth of the machine's memory, so that its cores can work on several."""
    return max(IN_FLIGHT_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)


def in_order(
    tasks: Iterable[tuple[int, Callable[[], T]]], *, workers: int, most_bytes: int | None = None
) -> Iterator[T]:
    """The results of `tasks`, (bytes it holds, work) pairs, in their order, with up to `workers` at work ahead of what is asked for.

    `most_bytes`: what those may hold together, by default `IN_FLIGHT_BYTES`. A task's exception is raised in its place; what
    had been started is waited for, what had not is dropped.
    """
    before = torch.get_num_threads()
    budget = IN_FLIGHT_BYTES if most_bytes is None else most_bytes
    running: deque[tuple[Future[T], int]] = deque()
    held = 0
    pool = ThreadPoolExecutor(workers, "bmm-worker", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for size, work in tasks:
            while running and (len(running) > workers or held + size > budget):
                future, done = running.popleft()
                held -= done
                result = future.result()
                del future  # it would keep its result alive
                yield result
                del result
            running.append((pool.submit(work), size))
            held += size
        while running:
            yield running.popleft()[0].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)  # a worker's setting becomes the default of threads yet to come

"""Many calls of one function, results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bmm_engine.executors.contract import Completed, Executor
from bmm_engine.progress import track


def run_all(
    executor: Executor, function: Callable[..., Any], calls: Sequence[tuple], label: str = "working"
) -> list[Any]:
    """`function(state, *args)` for every `args` of `calls`; their results in the order of `calls`, under a progress bar called `label`.

    Nothing else may be in flight. Raises the first error that occurs; the other calls are cancelled then, and the executor can be used on.
    """
    position = {f"{label}, {i + 1} of {len(calls)}": i for i in range(len(calls))}
    results: list[Any] = [None] * len(calls)
    try:
        for job, i in position.items():
            executor.submit(job, function, *calls[i])
        for done in track(_completions(executor, len(calls)), label, total=len(calls)):
            if done.error is not None:
                raise done.error
            results[position[str(done.job)]] = done.result
    except BaseException:
        executor.cancel()
        raise
    return results


def _completions(executor: Executor, count: int) -> Iterator[Completed]:
    while count > 0:
        completed = executor.wait()
        assert completed, f"{count} jobs are not in flight any more, and were not completed"
        count -= len(completed)
        yield from completed

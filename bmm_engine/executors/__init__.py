"""Run jobs here, in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from bmm_engine.errors import ConfigError
from bmm_engine.executors.contract import Completed, Executor, Shared, WorkerInfo
from bmm_engine.executors.gather import run_all

__all__ = ["Completed", "Executor", "Shared", "WorkerInfo", "open_executor", "run_all"]


def open_executor(
    workers: int = 0,
    ray: str | None = None,
    start_method: str = "spawn",
    folder: Path | None = None,
) -> Executor:
    """Workers for jobs. `workers`: 0 or 1 for this process itself, else so many processes; with `ray`, the address of a cluster
    ("local" starts one on this machine), so many of its actors, at least one.

    `start_method`: of processes, "spawn" or "forkserver". `folder`: where what processes share is written, by default the system's
    folder for temporary files. Raises `ConfigError` (a negative number, an unknown start method, Ray not installed or not answering).
    """
    # Imported here, since workers import this package too, and need none of it.
    if workers < 0:
        raise ConfigError(f"workers is {workers}; give 0 for none but this process, or how many.")
    if ray is not None:
        if find_spec("ray") is None:
            raise ConfigError("workers on a Ray cluster need the package ray: pip install 'bmm-engine[ray]'.")
        from bmm_engine.executors.ray_cluster import RayExecutor

        return RayExecutor(ray, max(1, workers))
    if workers <= 1:
        from bmm_engine.executors.inline import InlineExecutor

        return InlineExecutor()
    from bmm_engine.executors.processes import ProcessExecutor

    return ProcessExecutor(workers, start_method=start_method, folder=folder)

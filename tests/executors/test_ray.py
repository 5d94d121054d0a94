"""The same contract on a Ray cluster, where Ray is installed."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator

import pytest
import torch

from bmm_engine.errors import ConfigError, NonFiniteGramError, WorkerLostError
from bmm_engine.executors import Executor, open_executor, run_all
from bmm_engine.executors.ray_cluster import gpus_each
from tests.executors import jobs
from tests.executors.ended import end_by
from tests.executors.places import assert_same_results_as_here

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Executor]:
    with open_executor(2, ray="local") as executor:
        yield executor
    assert not ray.is_initialized()


@pytest.fixture
def pool(cluster: Executor) -> Iterator[Executor]:
    yield cluster
    cluster.cancel()


def test_same_results_as_here(pool):
    assert_same_results_as_here(pool, 5)
    ((info, factor), threads, _, _), *_ = run_all(pool, jobs.info_of, [()])
    assert (info.workers, factor, threads) == (2, 3, 1)


def test_errors_keep_their_type_and_the_setup_is_not_retried(pool, tmp_path):
    pool.start(jobs.no_state)
    pool.submit("a", jobs.fail, "keywords")
    (done,) = pool.wait()
    assert type(done.error) is NonFiniteGramError
    assert (str(done.error), done.error.count) == ("3 entries are not finite", 3)
    assert "jobs.py" in str(done.error.__cause__)
    pool.submit("b", jobs.unsendable)
    (done,) = pool.wait()
    assert "generator" in str(done.error)
    with pytest.raises(ConfigError, match=r"job 'c' .* cannot be sent to a worker"):
        pool.submit("c", jobs.fail, (number for number in range(3)))
    pool.start(jobs.refuse, str(tmp_path / "marks"))
    pool.submit("d", jobs.square_later, 1, 0.0)
    with pytest.raises(NonFiniteGramError, match="no state for you"):
        pool.wait()
    assert (tmp_path / "marks").read_text() == "x"


def test_lost_actors_are_replaced_and_a_deadly_job_is_given_up(pool, tmp_path):
    pool.start(jobs.no_state)
    pool.submit("deadly", jobs.die, str(tmp_path / "deadly"), 99)
    pool.submit("fragile", jobs.die, str(tmp_path / "fragile"), 1)
    for number in range(3):
        pool.submit(number, jobs.square_later, number, 0.05)
    completed = {}
    while done := pool.wait():
        completed |= {d.job: d for d in done}
    lost = completed.pop("deadly").error
    assert isinstance(lost, WorkerLostError)
    assert (lost.job, lost.attempts) == ("deadly", 3)
    assert completed.pop("fragile").result == "survived"
    assert {job: done.result for job, done in completed.items()} == {0: 0, 1: 1, 2: 4}
    assert (tmp_path / "deadly").read_text() == "xxx"


def test_shared_tensors_are_read_where_they_lie(pool):
    tensors = {f"many.{i}": torch.full((200, i % 3), float(i)) for i in range(100)}
    tensors |= {"half": torch.randn(30, 40).bfloat16(), "turned": torch.randn(30, 40).T, "one": torch.tensor(3)}
    pool.start(jobs.keep_shared, pool.share(tensors))
    (found,) = run_all(pool, jobs.sums, [()])
    for name, tensor in tensors.items():
        dtype, shape, values, contiguous, mapped = found[name]
        assert (dtype, shape, values, contiguous) == (tensor.dtype, tensor.shape, tensor.double().tolist(), True)
        assert mapped or tensor.numel() * tensor.element_size() < 1000


def test_wait_keeps_to_its_timeout(pool):
    pool.start(jobs.no_state)
    run_all(pool, jobs.square_later, [(1, 0.0)])
    pool.submit("slow", jobs.square_later, 4, 0.6)
    started = time.monotonic()
    assert pool.wait(0.1) == []
    assert 0.1 <= time.monotonic() - started < 0.5
    assert [done.result for done in pool.wait()] == [16]


def test_a_running_cluster_is_used_and_left_up(pool):
    with open_executor(1, ray="local"):
        pass
    pool.start(jobs.no_state)
    assert run_all(pool, jobs.square_later, [(3, 0.0)]) == [9]


def test_an_address_where_no_cluster_answers_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, but not listening
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no cluster answers at '{address}'"):
            open_executor(2, ray=address)


@pytest.mark.parametrize(
    ("gpus", "workers", "each"), [(0, 4, 0.0), (1, 1, 1.0), (2, 3, 0.5), (2, 6, 0.3333), (8, 2, 1.0)]
)
def test_gpus_are_shared_so_that_all_workers_find_room(gpus, workers, each):
    assert gpus_each(gpus, workers) == each
    assert gpus == 0 or int(1 / each) * gpus >= workers


SCRIPT = """
import signal
import sys
from bmm_engine.executors import open_executor
from tests.executors import jobs

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C, and so would what it starts
with open_executor(2, ray="local") as executor:
    executor.start(jobs.no_state)
    for job in range(2):
        executor.submit(job, jobs.report_and_sleep, sys.argv[1])
    executor.wait()
"""


def test_ctrl_c_leaves_no_process(tmp_path):
    code, _ = end_by(signal.SIGINT, SCRIPT, tmp_path, str(tmp_path / "pids"))
    assert code == -signal.SIGINT

"""Jobs here and in processes: same results, typed errors, lost workers."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch

from bmm_engine.errors import ConfigError, NonFiniteGramError, OutputWriteError, WorkerLostError
from bmm_engine.executors import Executor, WorkerInfo, open_executor, run_all
from bmm_engine.executors.inline import InlineExecutor
from bmm_engine.executors.shared import SharedFolder
from tests.executors import jobs
from tests.executors.places import assert_same_results_as_here


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with open_executor(2) as executor:
        yield executor


@pytest.fixture
def pool(processes: Executor) -> Iterator[Executor]:
    """Two processes that tests use one after another, since they take seconds to start."""
    yield processes
    processes.cancel()


def test_results_and_their_order_do_not_depend_on_where_jobs_run(pool):
    found = assert_same_results_as_here(pool, 7)
    found[-1]["product"].add_(1)  # results are the caller's own


def test_run_all_orders_results_by_call_and_not_by_completion(pool):
    pool.start(jobs.no_state)
    assert run_all(pool, jobs.square_later, [(5, 0.3), (6, 0.0), (7, 0.0)]) == [25, 36, 49]


def test_workers_are_told_apart_have_one_thread_each_and_their_own_state(pool):
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    pool.start(jobs.keep_info, 5)
    for job in range(2):
        pool.submit(job, jobs.square_later, job, 0.3)  # both workers are at work at the same time
    while pool.wait():
        pass
    for job in range(20):
        pool.submit(job, jobs.info_of)
    seen = {}
    while completed := pool.wait():
        for done in completed:
            (info, _), threads, environment, _ = done.result
            assert (threads, set(environment.values()), info.workers) == (1, {"1"}, 2)
            seen[info.index] = done.worker
    assert seen == {0: "process 0", 1: "process 1"}
    assert before == {name: os.environ.get(name) for name in before}


def test_start_again_makes_a_new_state_in_the_same_workers(pool):
    pids = []
    for factor in (1, 2):
        pool.start(jobs.keep_info, factor)
        (_info, kept), *_, pid = run_all(pool, jobs.info_of, [()])[0]
        assert kept == factor
        pids.append(pid)
    assert pids[0] == pids[1]


def test_start_while_jobs_are_in_flight_is_refused_until_they_are_cancelled(pool):
    for executor in (pool, open_executor()):
        executor.start(jobs.no_state)
        executor.submit("a", jobs.square_later, 2, 0.1)
        with pytest.raises(ConfigError, match="1 jobs are in flight"):
            executor.start(jobs.no_state)
        executor.cancel()
        executor.start(jobs.keep_info, 1)
        assert executor.wait() == []
        executor.submit("b", jobs.info_of)
        assert [done.job for done in executor.wait()] == ["b"]


@pytest.mark.parametrize("where", ["inline", "processes"])
def test_errors_keep_their_type_attributes_and_message(pool, where):
    executor = pool if where == "processes" else open_executor()
    executor.start(jobs.no_state)
    error = _error(executor, jobs.fail, "keywords")
    assert type(error) is NonFiniteGramError
    assert (str(error), error.module, error.count) == ("3 entries are not finite", "layer.0", 3)
    error = _error(executor, jobs.fail, "two faces")
    assert (type(error), str(error)) == (jobs.TwoFaced, "2 faces")
    error = _error(executor, jobs.fail, "os")
    assert (type(error), error.filename) == (FileNotFoundError, "/nowhere/to/be/found")
    error = _error(executor, jobs.fail, "decode")
    assert (type(error), error.reason) == (UnicodeDecodeError, "invalid start byte")
    # A job's failure costs no worker, and says where it happened.
    assert "jobs.py" in "".join(traceback.format_exception(error))


def test_errors_and_results_that_cannot_travel_are_errors_of_their_job(pool):
    pool.start(jobs.no_state)
    error = _error(pool, jobs.fail, "local")
    assert type(error) is RuntimeError
    assert "Local: of a function's own" in str(error)
    assert "generator" in str(_error(pool, jobs.unsendable))
    assert type(_error(pool, jobs.fail, "exit")) is SystemExit
    with pytest.raises(ConfigError, match=r"job 'a' .*<lambda>.* cannot be sent to a worker"):
        pool.submit("a", lambda state: 1)
    with pytest.raises(ConfigError, match="the setup of workers"):
        pool.start(lambda info: 1)
    assert pool.wait() == []


def test_run_all_stops_at_the_first_error_and_leaves_the_executor_usable(pool, tmp_path):
    # Of several workers a later job may fail first.
    for executor, errors in ((pool, (NonFiniteGramError, FileNotFoundError)), (open_executor(), NonFiniteGramError)):
        executor.start(jobs.no_state)
        with pytest.raises(errors):
            run_all(executor, jobs.fail, [("keywords",)] + [("os",)] * 5)
        assert executor.wait() == []
        assert run_all(executor, jobs.square_later, [(3, 0.0)]) == [9]


def test_an_error_of_the_setup_is_raised_once_for_all_and_not_retried(pool, tmp_path):
    for name, executor in (("pool", pool), ("inline", open_executor())):
        marks = tmp_path / name
        executor.start(jobs.refuse, str(marks))
        executor.submit(0, jobs.square_later, 1, 0.0)
        for _ in range(1 + (name == "pool")):
            with pytest.raises(NonFiniteGramError, match="no state for you") as caught:
                executor.wait()
        assert caught.value.module == "layer.0"
        assert marks.read_text() == "x"
        executor.start(jobs.no_state)
        assert run_all(executor, jobs.square_later, [(3, 0.0)]) == [9]


def test_wait_keeps_to_its_timeout(pool):
    pool.start(jobs.no_state)
    run_all(pool, jobs.square_later, [(1, 0.0)])
    pool.submit("slow", jobs.square_later, 4, 0.6)
    started = time.monotonic()
    assert pool.wait(0) == []
    assert pool.wait(0.1) == []
    assert 0.1 <= time.monotonic() - started < 0.5
    (done,) = pool.wait(30)
    assert (done.job, done.result, done.error) == ("slow", 16, None)
    assert pool.wait(30) == []


def test_a_killed_worker_loses_nothing_and_its_job_is_next(pool, tmp_path):
    pool.start(jobs.no_state)
    marks = tmp_path / "marks"
    pool.submit("fragile", jobs.die, str(marks), 1)
    for number in range(4):
        pool.submit(number, jobs.square_later, number, 0.05)
    completed = {}
    while done := pool.wait():
        completed |= {d.job: d for d in done}
    assert completed.pop("fragile").result == "survived"
    assert marks.read_text() == "xx"
    assert {job: done.result for job, done in completed.items()} == {0: 0, 1: 1, 2: 4, 3: 9}


def test_a_job_that_kills_every_worker_is_given_up(pool, tmp_path):
    pool.start(jobs.no_state)
    marks = tmp_path / "marks"
    pool.submit("deadly", jobs.die, str(marks), 99)
    (done,) = pool.wait()
    assert isinstance(done.error, WorkerLostError)
    assert (done.error.job, done.error.attempts, done.error.cause) == ("deadly", 3, "SIGKILL")
    assert "job 'deadly': 3 workers were lost, the last one with SIGKILL" in str(done.error)
    assert "use fewer workers" in str(done.error)
    assert marks.read_text() == "xxx"
    assert run_all(pool, jobs.square_later, [(3, 0.0)]) == [9]


def test_a_setup_that_kills_every_worker_is_given_up(pool, tmp_path):
    marks = tmp_path / "marks"
    pool.start(jobs.die_in_setup, str(marks))
    pool.submit("a", jobs.square_later, 1, 0.0)
    expected = "workers die while making their state: 3 workers were lost, the last one with exit code 7"
    with pytest.raises(WorkerLostError, match=expected):
        pool.wait()
    assert marks.read_text() == "xxx"
    pool.start(jobs.no_state)
    assert run_all(pool, jobs.square_later, [(3, 0.0)]) == [9]


@pytest.mark.parametrize("where", ["inline", "processes"])
def test_shared_tensors_arrive_as_they_are_and_in_mapped_pages(where, tmp_path):
    whole = torch.randn(6, 8)
    tensors = {f"many.{i}": torch.full((2, i % 3), float(i)) for i in range(300)}
    tensors |= {"half": whole.bfloat16(), "rows": whole[2:4], "whole": whole, "turned": whole.T, "one": torch.tensor(3)}
    with open_executor(2 if where == "processes" else 0, folder=tmp_path / "study") as executor:
        shared = executor.share(tensors)
        executor.start(jobs.keep_shared, shared)
        (found,) = run_all(executor, jobs.sums, [()])
        for name, tensor in tensors.items():
            dtype, shape, values, contiguous, mapped = found[name]
            assert (dtype, shape, values, contiguous) == (tensor.dtype, tensor.shape, tensor.double().tolist(), True)
            assert mapped == (where == "processes" and tensor.numel() > 0)
        assert found.keys() == tensors.keys()
        if where == "processes":
            run_all(executor, jobs.spoil, [()])  # what a worker writes is its own
            torch.testing.assert_close(shared.tensors()["whole"], whole, rtol=0, atol=0)
            (private,) = (tmp_path / "study").iterdir()
            assert private.stat().st_mode & 0o077 == 0
    assert not list(tmp_path.glob("study/*"))


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path):
    abandoned = tmp_path / ".shared-abandoned"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    theirs = tmp_path / ".shared-with-you"
    theirs.mkdir()
    (theirs / "lock").touch()
    (theirs / "notes").write_text("precious")
    first, second = SharedFolder(tmp_path), SharedFolder(tmp_path)
    handle = first.write({"a": torch.ones(2)})
    second.write({"a": torch.zeros(2)})
    assert not abandoned.exists()
    assert (theirs / "notes").read_text() == "precious"
    assert handle.tensors()["a"].tolist() == [1, 1]
    first.remove()
    second.remove()
    assert list(tmp_path.iterdir()) == [theirs]


def test_no_room_for_shared_tensors_is_a_typed_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputWriteError, match=r"1 tensors \(8 bytes\) cannot be written"):
        SharedFolder(tmp_path / "file").write({"a": torch.ones(2)})


def test_close_kills_what_runs_and_may_be_called_again(tmp_path):
    executor = open_executor(2)
    executor.start(jobs.no_state)
    executor.submit(0, jobs.report_and_sleep, str(tmp_path))
    while not list(tmp_path.iterdir()):
        assert executor.wait(0.05) == []
    (pid,) = [int(path.name) for path in tmp_path.iterdir()]
    started = time.monotonic()
    executor.close()
    executor.close()
    assert time.monotonic() - started < 5
    assert not psutil.pid_exists(pid)  # not even as a zombie
    with pytest.raises(ConfigError, match="job 1 has no worker"):
        executor.submit(1, jobs.no_state)


def test_workers_leave_ctrl_c_to_their_parent(pool):
    pool.start(jobs.no_state)
    assert run_all(pool, jobs.interrupt_itself, [()]) == ["unmoved"]


def test_jobs_may_start_processes_of_their_own(pool):
    pool.start(jobs.no_state)
    assert run_all(pool, jobs.start_a_child, [()]) == [5]


def test_device_spreads_workers_over_the_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [WorkerInfo(i, 5).device("cuda") for i in range(5)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert [WorkerInfo(1, 2).device(name) for name in ("cpu", "cuda:0")] == ["cpu", "cuda:0"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        WorkerInfo(0, 1).device("cuda")


def test_open_executor_refuses_what_it_cannot_do(monkeypatch):
    assert isinstance(open_executor(1), InlineExecutor)
    with pytest.raises(ConfigError, match="workers is -1"):
        open_executor(-1)
    with pytest.raises(ConfigError, match="'fork'; choose spawn or forkserver"):
        open_executor(2, start_method="fork")
    monkeypatch.setattr("bmm_engine.executors.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'bmm-engine\[ray\]'"):
        open_executor(2, ray="local")
    with open_executor() as executor, pytest.raises(ConfigError, match="start\\(\\) was not called"):
        executor.submit(0, jobs.no_state)


def test_a_forkserver_serves_too():
    with open_executor(2, start_method="forkserver") as executor:
        executor.start(jobs.keep_info, 1)
        (_, threads, environment, _), *_ = run_all(executor, jobs.info_of, [()])
        assert (threads, set(environment.values())) == (1, {"1"})


def _error(executor: Executor, function: Callable, *args: object) -> BaseException:
    executor.submit("failing", function, *args)
    (done,) = executor.wait()
    assert done.error is not None
    return done.error

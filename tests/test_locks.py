"""Who drives a study and who works for it: across processes, within one, and after a SIGKILL."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from bmm_engine.errors import StudyBusyError, StudyError
from bmm_engine.locks import LockFile
from bmm_engine.searching.study import Study
from bmm_engine.searching.study_locks import LOCK

RECORD = {"identity": {}}


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "x.study", RECORD) as made:
        yield made


@contextmanager
def child(program, *arguments):
    """A process that has printed "ready"; killed in the end."""
    start = "import sys\nfrom bmm_engine.searching.study import Study\n"
    command = [sys.executable, "-c", start + program, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


DRIVE = """
with Study.open(sys.argv[1]) as study, study.drive():
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_one_process_drives_until_it_ends_or_is_killed(study):
    with Study.open(study.folder, readonly=True) as reader:
        for how in ("killed", "ended"):
            assert not study.driver_alive()
            with child(DRIVE, study.folder) as process:
                assert study.driver_alive()
                assert reader.driver_alive()
                with pytest.raises(
                    StudyBusyError, match=rf"process {process.pid} drives .* Wait until it has ended, or .* --join"
                ):
                    study.drive().__enter__()
                if how == "ended":
                    process.communicate("\n")
                else:
                    process.kill()
                process.wait()
                with study.drive():
                    assert reader.driver_alive()


def test_one_process_drives_once(study):
    """Locks of a process do not conflict with one another; the second drive must be refused all the same."""
    with Study.open(study.folder) as other:
        with study.drive():
            assert other.driver_alive()
            for again in (study, other):
                with pytest.raises(StudyBusyError, match="this process drives this search already"):
                    again.drive().__enter__()
        with other.drive(), pytest.raises(StudyBusyError):
            study.drive().__enter__()
    assert not study.driver_alive()


TRY = """
study = Study.open(sys.argv[1])
print("ready", study.driver_alive(), [p.name for p in study.participants()])
"""


def seen_by_another_process(study):
    command = [
        sys.executable,
        "-c",
        "import sys\nfrom bmm_engine.searching.study import Study\n" + TRY,
        str(study.folder),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_closing_another_study_of_the_folder_drops_no_lock(study):
    """POSIX drops a process's locks when any descriptor of the file is closed."""
    with study.drive(), study.join() as worker:
        Study.open(study.folder).close()
        Study.open(study.folder, readonly=True).close()
        assert seen_by_another_process(study) == f"ready True ['{worker.name}']"
    assert seen_by_another_process(study) == "ready False []"


def test_closing_a_study_ends_what_it_drives_and_joined(study):
    with Study.open(study.folder) as other:
        driving = other.drive()
        driving.__enter__()
        joined = other.join()
        other.close()
        joined.leave()
        assert not study.driver_alive()
        assert study.participants() == []
        with study.drive():
            driving.__exit__(None, None, None)
            assert study.driver_alive(), "a drive that is over does not end another"


JOIN = """
with Study.open(sys.argv[1]) as study, study.join() as worker:
    trial = study.claim(worker)
    print("ready", flush=True)
    print(worker.name, trial.number, flush=True)
    sys.stdin.readline()
"""


def test_trials_of_a_dead_worker_are_orphans(study):
    for _ in range(3):
        study.add("proposed", {}, waiting=True)
    with study.drive(), study.join() as here, child(JOIN, study.folder) as process:
        name, number = process.stdout.readline().split()
        assert number == "0"
        assert study.claim(here).number == 1
        assert study.start(2, "driver")
        assert [(p.name, p.pid) for p in study.participants()] == [(here.name, os.getpid()), (name, process.pid)]
        assert study.orphans() == []
        process.kill()
        process.wait()
        assert [p.name for p in study.participants()] == [here.name]
        (orphan,) = study.orphans()
        assert (orphan.number, orphan.worker) == (0, name)
        assert study.give_back(0)
        here.leave()
        assert [t.number for t in study.orphans()] == [1]
        with study.join() as later:
            assert later.name not in (name, here.name), "names are not used again"
            with study._database.reading() as connection:
                open_rows = connection.execute("SELECT id FROM participants WHERE ended IS NULL").fetchall()
            assert [row["id"] for row in open_rows] == [later.id], "the dead are not asked after again"
            assert study.claim(later).number == 0
            assert not study.evaluated(0, {}, 1, 1, name), "it is no longer the dead one's"
            assert [t.number for t in study.orphans()] == [1]
    assert [t.number for t in study.orphans()] == [0, 1, 2], "nobody is left, the driver neither"


CLAIM = """
import random, time
with Study.open(sys.argv[1]) as study, study.join() as worker:
    print("ready", flush=True)
    sys.stdin.readline()
    while (trial := study.claim(worker)) is not None:
        assert study.evaluated(trial.number, {}, 1, 1, worker.name)
        print(trial.number, flush=True)
        time.sleep(random.uniform(0, 0.005))  # without a pause SQLite favours whoever wrote last
"""


def test_no_two_claimers_take_one_trial(study):
    count = 80
    for _ in range(count):
        study.add("proposed", {}, waiting=True)
    with child(CLAIM, study.folder) as one, child(CLAIM, study.folder) as two:
        for process in (one, two):
            process.stdin.write("\n")
            process.stdin.flush()
        taken = [[int(line) for line in process.stdout.read().split()] for process in (one, two)]
    assert sorted(taken[0] + taken[1]) == list(range(count))
    assert all(numbers and numbers == sorted(numbers) for numbers in taken)
    assert {t.worker for t in study.trials(["evaluated"])} == {"worker-1", "worker-2"}


def test_threads_get_a_lock_once(tmp_path):
    locks = LockFile.open(tmp_path / LOCK, create=True)
    barrier, got = threading.Barrier(8), []

    def take():
        barrier.wait()
        got.append(locks.acquire(5))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]
    assert (locks.holder(5), locks.holder(4)) == (os.getpid(), None)
    locks.release(5)
    assert locks.holder(5) is None
    locks.close()


FORK = """
import os
from bmm_engine.errors import StudyBusyError, StudyError
study = Study.open(sys.argv[1])
with study.drive():
    child = os.fork()
    if child == 0:
        try:
            study.trials()
        except StudyError as error:
            assert "fork" in str(error)
        else:
            os._exit(1)
        with Study.open(sys.argv[1]) as own:
            assert own.driver_alive()
            try:
                own.drive().__enter__()
            except StudyBusyError as error:
                os._exit(0 if str(os.getppid()) in str(error) else 2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert study.driver_alive()
    study.add("proposed", {}, waiting=True)
study.close()
print("ready", flush=True)
"""


def test_a_fork_holds_none_of_its_parents_locks(study):
    with child(FORK, study.folder):
        assert len(study.trials()) == 1


def test_a_lock_file_that_cannot_be_used_is_named(tmp_path):
    Study.create(tmp_path / "x.study", RECORD).close()
    (tmp_path / "x.study" / LOCK).unlink()
    with Study.open(tmp_path / "x.study", readonly=True) as reader:
        assert not reader.driver_alive()
    (tmp_path / "x.study" / LOCK).mkdir()
    with pytest.raises(StudyError, match=r"lock: cannot be locked"):
        Study.open(tmp_path / "x.study")

from __future__ import annotations

import threading
import time

import pytest
import torch

from bmm_engine import parallel
from bmm_engine.parallel import in_order, one_thread


def test_results_come_in_order_from_single_threaded_workers():
    torch.set_num_threads(2)

    def work(i):
        time.sleep(0.01 * (3 - i % 4))
        return i, torch.get_num_threads(), threading.current_thread().name

    results = list(in_order(((1, lambda i=i: work(i)) for i in range(12)), workers=3))
    assert [r[0] for r in results] == list(range(12))
    assert {r[1] for r in results} == {1}
    assert len({r[2] for r in results}) > 1
    assert torch.get_num_threads() == 2


def test_memory_in_flight_is_bounded(monkeypatch):
    monkeypatch.setattr(parallel, "IN_FLIGHT_BYTES", 100)
    held, most, lock = [0], [0], threading.Lock()

    def work():
        with lock:
            held[0] += 60
            most[0] = max(most[0], held[0])
        time.sleep(0.005)
        with lock:
            held[0] -= 60

    list(in_order(((60, work) for _ in range(8)), workers=4))
    assert most[0] == 60, "two pieces of 60 do not fit into 100"
    list(in_order(((40, work) for _ in range(8)), workers=4))
    assert most[0] == 120, "two of 40 do, and are done at once"


def test_an_error_comes_in_its_place_and_ends_the_work():
    done = []

    def work(i):
        if i == 2:
            raise ValueError("two")
        done.append(i)
        return i

    results = in_order(((1, lambda i=i: work(i)) for i in range(100)), workers=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert len(done) < 10
    assert not [t for t in threading.enumerate() if t.name.startswith("bmm-worker")]


def test_one_thread_is_left_as_it_was_found():
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2

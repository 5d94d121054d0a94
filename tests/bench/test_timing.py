from __future__ import annotations

import time

import pytest
import torch

from bench import timing

CPU = torch.device("cpu")


def test_variants_take_turns_and_each_sample_is_preceded_by_the_same_pause(monkeypatch):
    events = []
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: events.append("pause") or seconds)
    monkeypatch.setattr(timing, "MAX_CALLS", 1)
    samples = timing.interleaved([lambda: events.append("a"), lambda: events.append("b")], CPU, rounds=3)
    assert [len(own) for own in samples] == [3, 3]
    assert events[::2] == ["pause"] * 8
    warm_up, rounds = events[1::2][:2], events[1::2][2:]
    assert warm_up == ["a", "b"]
    assert rounds == ["a", "b", "b", "a", "a", "b"]  # nobody always follows the same one


def test_short_calls_are_repeated_and_times_are_per_call():
    counts = [0]

    def work():
        counts[0] += 1
        time.sleep(0.0005)

    (samples,) = timing.interleaved([work], CPU, rounds=5)
    assert counts[0] > 10
    # The fastest: a busy machine may hold up any of them, but not all.
    assert 0.5 < min(samples) < 2


def test_slow_work_is_sampled_less_often_and_often_enough(monkeypatch):
    monkeypatch.setattr(timing, "sample", lambda work, *_, **__: work())
    for seconds, expected in ((0.1, 9), (4.0, 7), (100.0, 5)):
        (samples,) = timing.interleaved([lambda ms=seconds * 1e3: ms], CPU, rounds=9)
        assert len(samples) == expected
    (samples,) = timing.interleaved([lambda: 1e5], CPU, rounds=3)
    assert len(samples) == 3


def test_spread_is_the_interquartile_range_over_the_median():
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((4.5 - 1.5) / 3)
    assert timing.spread([2.0, 2.0]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("cold", [False, True])
def test_on_a_gpu_the_work_is_timed_and_not_its_launch(cold):
    device = torch.device("cuda")
    small, large = (torch.ones(size, device=device) for size in (1 << 20, 1 << 29))
    samples = timing.interleaved([lambda: small.mul_(1), lambda: large.mul_(1)], device, rounds=3, cold=cold)
    assert min(samples[1]) > 10 * max(samples[0])

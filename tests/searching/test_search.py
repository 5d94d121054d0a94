"""Whole searches in memory: what is tried first, resuming, schedules, races, failures."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import bmm_engine as bmm
from bmm_engine.errors import ConfigError, DataError, SearchError
from bmm_engine.evaluators.scores import Score
from bmm_engine.searching.run import search
from tests.tiny import fine_tune, make_base


class Distance:
    """Scores a model by how near one of its weights is to a target: 1 at the target. Counts its calls, and can be told to stop."""

    def __init__(self, target, stop_after=None):
        self.target, self.calls, self.stop_after = target, 0, stop_after

    def __call__(self, model, task):
        if self.stop_after is not None and self.calls >= self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        weight = dict(model.named_parameters())[f"bert.encoder.layer.{int(task[-1])}.intermediate.dense.weight"]
        return 1 / (1 + 100 * float((weight - self.target[task]).norm()))


@pytest.fixture(scope="module")
def models():
    base = make_base("bert")
    return base, [fine_tune(base, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def target(models):
    """What the merge at another ridge than the default's would be."""
    found = bmm.merge(*models, alpha=2.0, progress=False).tensors
    return {f"task {i}": found[f"bert.encoder.layer.{i}.intermediate.dense.weight"] for i in range(2)}


def run(models, evaluate, **options):
    options = {"trials": 16, "groups": "role", "scales": "fixed", "optimizer": "BO", **options}
    return search(*models, evaluate, expert_scores={"task 0": 1.0, "task 1": 1.0}, **options)


def points(result_or_study):
    return [(t.kind, t.parameters, t.value) for t in result_or_study]


def test_it_starts_from_the_anchor_and_the_default_and_beats_both(models, target, tmp_path):
    result = run(models, Distance(target), study=tmp_path / "s.study", anchors=["average", "ties"])
    trials = trials_of(tmp_path / "s.study")
    assert [t.kind for t in trials[:5]] == ["anchor", "anchor", "default", "default", "proposed"]
    assert set(trials[0].parameters["alpha"].values()) == {"inf"}
    assert set(trials[2].parameters["alpha"].values()) == {0.03}
    assert result.best.value == max(t.value for t in trials) > trials[2].value
    assert len(trials) == result.trials == 16
    merged = bmm.merge(*models, progress=False, **result.arguments).tensors
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor, merged[name])
    assert [row["name"] for row in result.rows] == ["experts", f"anchor ({result.best.parameters['anchor']})",
                                                    f"default ({result.best.parameters['anchor']})", "best"]  # fmt: skip


def test_with_a_filter_what_is_judged_is_the_merge_with_it(models):
    own = {"filter": "exponential", "directions": 0.65}
    found = bmm.merge(*models, alpha=2.0, progress=False, **own).tensors
    judge = Distance({f"task {i}": found[f"bert.encoder.layer.{i}.intermediate.dense.weight"] for i in range(2)})
    result = run(models, judge, trials=5, **own)
    merged = bmm.merge(*models, progress=False, **own, **result.arguments).tensors
    assert all(torch.equal(tensor, merged[name]) for name, tensor in result.tensors.items())
    plain = bmm.merge(*models, progress=False, **result.arguments).tensors
    assert any(not torch.equal(tensor, merged[name]) for name, tensor in plain.items())
    live = copy.deepcopy(models[0]).requires_grad_(False)
    live.load_state_dict(merged)
    for task, score in result.best.scores.items():
        assert judge(live, task) == pytest.approx(score.value, rel=1e-3)


def trials_of(folder):
    from bmm_engine.searching.study import Study

    with Study.open(folder, readonly=True) as study:
        return study.trials()


@pytest.mark.parametrize("stops", [[1], [7, 3], [20, 5, 5]])
def test_interrupted_and_resumed_it_runs_the_same_trials(models, target, tmp_path, stops):
    whole = tmp_path / "whole.study"
    evaluate = Distance(target)
    run(models, evaluate, study=whole)
    calls, parts = 0, tmp_path / "parts.study"
    for stop in stops:
        own = Distance(target, stop_after=stop)
        with pytest.raises(KeyboardInterrupt):
            run(models, own, study=parts)
        calls += own.calls
    last = Distance(target)
    run(models, last, study=parts)
    assert points(trials_of(parts)) == points(trials_of(whole))
    assert calls + last.calls <= evaluate.calls + len(stops)  # only the trials in flight were run again: two tasks each
    again = Distance(target)
    assert run(models, again, study=parts).trials == 16
    assert again.calls == 0


def test_a_larger_budget_goes_on_from_a_finished_study(models, target, tmp_path):
    first = run(models, Distance(target), study=tmp_path / "s.study", trials=6)
    known = points(trials_of(tmp_path / "s.study"))
    more = run(models, Distance(target), study=tmp_path / "s.study", trials=9)
    assert points(trials_of(tmp_path / "s.study"))[:6] == known
    assert more.trials == 9
    assert more.best.value >= first.best.value


def test_another_search_is_refused_in_the_same_place(models, target, tmp_path):
    run(models, Distance(target), study=tmp_path / "s.study", trials=3)
    with pytest.raises(ConfigError, match=r"seed.*0.*1"):
        run(models, Distance(target), study=tmp_path / "s.study", trials=3, seed=1)
    with pytest.raises(ConfigError, match=r"alpha.*0\.03.*0\.5"):
        run(models, Distance(target), study=tmp_path / "s.study", trials=3, alpha=0.5)
    others = (models[0], [fine_tune(models[0], seed) for seed in (1, 7)])
    with pytest.raises(ConfigError, match="models"):
        run(others, Distance(target), study=tmp_path / "s.study", trials=3)


def test_identical_trials_are_not_run_twice(models, target, tmp_path):
    evaluate = Distance(target)
    result = run(
        models, evaluate, study=tmp_path / "s.study", groups="all", alpha_range=(0.0299999, 0.0300001), trials=30
    )
    assert evaluate.calls == 2 * result.trials  # the range holds three values of six digits, beside the anchor
    keys = [str(t.parameters) for t in trials_of(tmp_path / "s.study")]
    assert len(set(keys)) == len(keys) < 30


def test_a_race_spares_tasks_and_finds_the_same_best(models, target, tmp_path):
    plain, raced = Distance(target), Distance(target)
    first = run(models, plain, study=tmp_path / "plain.study", optimizer="RandomSearch")
    second = run(
        models, raced, study=tmp_path / "raced.study", optimizer="RandomSearch", racing=True, racing_margin=0.0
    )
    assert raced.calls < plain.calls
    assert second.best.parameters == first.best.parameters
    states = {t.state for t in trials_of(tmp_path / "raced.study")}
    assert states == {"finished", "pruned"}
    for t in trials_of(tmp_path / "raced.study"):
        if t.state == "pruned":
            assert len(t.scores) == 1
            assert t.value <= second.best.value


def test_a_lead_within_the_noise_is_not_taken(models, target, tmp_path):
    judge = Distance(target)

    def uncertain(model, task):
        value, half = judge(model, task), uncertain.half
        return Score(value, 100, value - half, value + half, "accuracy")

    def chosen(folder, half, **options):
        uncertain.half = half
        return run(models, uncertain, study=tmp_path / f"{folder}.study", **options).best

    sure = chosen("sure", 1e-6)
    assert sure.kind == "proposed"
    unsure = chosen("unsure", 1.0)
    known = max(trials_of(tmp_path / "unsure.study")[:2], key=lambda t: t.value)
    assert known.kind in ("anchor", "default")
    assert unsure.number == known.number
    assert unsure.value < sure.value
    # Two tasks: the mean's error is the root of 2 halves squared, over 1.96; the same study with another lead runs nothing again.
    calls, needed = judge.calls, (sure.value - known.value) / (1.0 / 1.959964 / math.sqrt(2))
    assert chosen("unsure", 1.0, lead=0.99 * needed).number == sure.number
    assert chosen("unsure", 1.0, lead=1.01 * needed).number == known.number
    assert chosen("unsure", 1.0, lead=0).number == sure.number
    assert judge.calls == calls


def test_the_worst_task_can_be_the_objective(models, target):
    mean = run(models, Distance(target), optimizer="TwoPointsDE", trials=30)
    worst = run(models, Distance(target), optimizer="TwoPointsDE", trials=30, objective="worst")

    def lowest(result):
        return min(score.value for score in result.best.scores.values())

    assert lowest(worst) >= lowest(mean) - 1e-9


def test_a_failing_candidate_does_not_end_the_search_but_a_failing_evaluation_does(models, target, tmp_path):
    evaluate = Distance(target)
    broken = {"trial": 4}

    def sometimes(model, task):
        number = evaluate.calls // 2
        if number == broken["trial"] and task == "task 0":
            evaluate.calls += 2
            raise DataError("logits are not finite")
        return evaluate(model, task)

    run(models, sometimes, study=tmp_path / "s.study", trials=8)
    trials = trials_of(tmp_path / "s.study")
    assert [t.state for t in trials] == ["finished"] * 4 + ["failed"] + ["finished"] * 3
    assert "logits are not finite" in trials[4].error

    def never(model, task):
        raise DataError("no such column")

    with pytest.raises(SearchError, match=r"trial 0 \(anchor\) failed: no such column"):
        run(models, never, trials=4)


def test_time_can_be_the_budget(models, target):
    evaluate = Distance(target)
    result = run(models, evaluate, trials=None, minutes=1e-9)
    assert result.trials == 0 or math.isfinite(result.best.value)


def test_experts_that_cannot_be_scored_are_named(models, target):
    with pytest.raises(ConfigError, match=r"expert 0 is no live model"):
        search(models[0], [e.state_dict() for e in models[1]], Distance(target))
    with pytest.raises(ConfigError, match="'a': its own expert scores 0"):
        search(*models, lambda model, task: 0.0, tasks=["a", "b"])

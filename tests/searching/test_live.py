"""What a trial evaluates is what the merge on disk is: candidates written into live models, against `merge`."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from bmm_engine import collect_grams, merge
from bmm_engine.evaluators.function import FunctionEvaluator
from bmm_engine.executors import WorkerInfo, open_executor
from bmm_engine.merging.factors import Factors
from bmm_engine.merging.plan import make_plan
from bmm_engine.merging.sources import Models
from bmm_engine.recipe.sections import SearchRecipe
from bmm_engine.recipe.settings import MergeSettings
from bmm_engine.searching.objective import get_objective
from bmm_engine.searching.problem import FunctionTasks, Problem
from bmm_engine.searching.session import prepare
from bmm_engine.searching.space import Candidate
from bmm_engine.searching.trial import FreeWriter, TrialRunner, Writer
from bmm_engine.searching.workers import open_runner
from bmm_engine.statistics.sets import Statistics
from tests import architectures
from tests.tiny import fine_tune, make_base, make_batches

ARCHITECTURES = ["bert", "gpt2", "vit", "llama"]


def problem_of(architecture, *, data=True, anchors=("average", "ties"), fit_bias=False, own=None, **search):
    base = make_base(architecture)
    experts = [fine_tune(base, seed) for seed in (1, 2)]
    grams = [collect_grams(e, make_batches(architecture, 5 + i)) for i, e in enumerate(experts)] if data else []
    settings = MergeSettings(gram_source="data" if data else "task_vectors", fit_bias=fit_bias, **(own or {}))
    tasks = FunctionTasks(base, experts, ("a", "b"), lambda model, task: 1.0)
    section = SearchRecipe(**search)
    chosen = {name: (name, {}) for name in anchors}
    return Problem(Models.open(base, experts), settings, Statistics(tuple(grams)), tasks, section, chosen)


def candidates(problem):
    """Some that differ in every variable, two of them in one only, so that what is left unwritten shows."""
    names = [g.name for g in problem.groups]
    first = {name: 10.0 ** (i % 5 - 2) for i, name in enumerate(names)}
    second = {**first, names[0]: math.inf, names[-1]: 7.0}
    ones, scales = dict.fromkeys(names, 1.0), {name: 0.8 + 0.1 * i for i, name in enumerate(names)}
    weights = problem.space.weightings or (problem.space.default_weights,)
    labels = list(problem.anchors)
    yield Candidate(labels[0], first, ones, weights[0])
    yield Candidate(labels[0], second, ones, weights[0])
    yield Candidate(labels[-1], second, scales, weights[-1])
    yield Candidate(labels[-1], dict.fromkeys(names, math.inf), scales, weights[-1])
    yield Candidate(labels[0], first, ones, weights[0])


def check(problem, live, writer, candidate):
    writer.write(candidate)
    tasks, grams = problem.tasks, problem.statistics.grams or "task_vectors"
    merged = merge(
        tasks.base, tasks.experts, grams=grams, dtype="float32", fit_bias=problem.settings.fit_bias, progress=False,
        filter=problem.settings.filter, directions=problem.settings.directions,
        prior=problem.settings.prior, **problem.settings_of(candidate),
    ).tensors  # fmt: skip
    for name, tensor in live.parameters.items():
        # A spectral factor in float32 against a Cholesky in float64, relative to the largest entry of the tensor.
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=2e-5 * float(merged[name].abs().max()), msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("data", [True, False], ids=["data", "data-free"])
def test_a_written_candidate_is_the_merge_it_stands_for(architecture, data):
    problem = problem_of(architecture, data=data, depth_bins=2, scales="group", weightings=["none", "frobenius"])
    with open_executor() as executor:
        prepared = prepare(problem, lambda: problem, executor)
    live = problem.tasks.live(problem.plan, "cpu")
    writer = Writer(live, Factors(prepared.groups, prepared.shared.tensors()), problem.groups)
    assert set(live.parameters) >= {m.weight for m in problem.plan.linear.values()}
    for candidate in candidates(problem):
        check(problem, live, writer, candidate)


FILTERS = [
    {"filter": "exponential", "directions": 0.65},
    {"directions": 5},
    {"filter": "truncated", "directions": "participation"},
]


@pytest.mark.parametrize(("own", "free"), [(FILTERS[0], True), (FILTERS[1], False), (FILTERS[2], True)], ids=str)
def test_a_filter_of_the_recipe_is_that_of_its_trials(own, free):
    problem = problem_of("bert", data=not free, own=own, groups="role", **({"weightings": "free"} if free else {}))
    with open_executor() as executor:
        prepared = prepare(problem, lambda: problem, executor)
    given = (prepared.groups, prepared.shared, "validation", "cpu")
    runner = open_runner(WorkerInfo(0, 1), lambda: problem, *given)
    assert isinstance(runner.writer, FreeWriter if free else Writer)
    for candidate in candidates(problem):
        weights = (0.7, 1.4) if free else candidate.task_weights
        check(problem, runner.live, runner.writer, replace(candidate, task_weights=weights))


@pytest.mark.parametrize("options", [{}, {"own": {"prior": 2.0}, "scales": "fixed"}], ids=["at the anchor", "overshot"])
def test_biases_that_are_solved_with_the_weights(options):
    problem = problem_of("bert", fit_bias=True, groups="role", **options)
    with open_executor() as executor:
        prepared = prepare(problem, lambda: problem, executor)
    live = problem.tasks.live(problem.plan, "cpu")
    writer = Writer(live, Factors(prepared.groups, prepared.shared.tensors()), problem.groups)
    for candidate in candidates(problem):
        check(problem, live, writer, candidate)


@pytest.mark.parametrize(("architecture", "prior"), [("bert", 1.0), ("gpt2", 1.5)])
def test_free_task_weights(architecture, prior):
    problem = problem_of(architecture, own={"prior": prior}, groups="role", scales="group", weightings="free")
    with open_executor() as executor:
        prepared = prepare(problem, lambda: problem, executor)
    live = problem.tasks.live(problem.plan, "cpu")
    writer = FreeWriter(problem.plan, live, Factors(prepared.groups, prepared.shared.tensors()), problem.groups)
    for i, candidate in enumerate(candidates(problem)):
        free = Candidate(candidate.anchor, candidate.alpha, candidate.scale, (1.0 + 0.3 * i, 1.0 - 0.2 * i))
        check(problem, live, writer, free)


def test_only_what_changed_is_computed(monkeypatch):
    problem = problem_of("bert", groups="role", scales="fixed", anchors=("average",))
    with open_executor() as executor:
        prepared = prepare(problem, lambda: problem, executor)
    live = problem.tasks.live(problem.plan, "cpu")
    factors = Factors(prepared.groups, prepared.shared.tensors())
    solved = []
    solve = Factors.solve
    monkeypatch.setattr(
        Factors, "solve", lambda self, module, *rest: (solved.append(module.name), solve(self, module, *rest))
    )
    evaluator = FunctionEvaluator(lambda model, task: 1.0, ("a", "b"), "validation")
    runner = TrialRunner(live, Writer(live, factors, problem.groups), evaluator, get_objective("mean"))
    first = problem.space.first_candidates()[1][1]
    runner.run(first)
    assert len(solved) == len(problem.modules)
    solved.clear()
    runner.run(Candidate(first.anchor, {**first.alpha, "mlp_out": 5.0}, first.scale, first.task_weights))
    assert solved == list(next(g for g in problem.groups if g.name == "mlp_out").modules)


def test_models_of_all_tasks_share_what_is_merged_and_keep_their_heads():
    from bmm_engine.pipeline.live import share_parameters

    problem = problem_of("bert", anchors=("average",))
    base, experts = problem.tasks.base, problem.tasks.experts
    plan = replace(problem, models=Models.open(base.bert, experts)).plan
    models = [(f"task {i}", i, lambda e=e: copy.deepcopy(e)) for i, e in enumerate(experts)]
    live = share_parameters(plan.alignment, models)
    live.load({name: torch.zeros(plan.alignment.base.spec(name).shape) for name in plan.alignment.merged})
    for task, expert in zip(("task 0", "task 1"), experts):
        model = live.models[task]
        assert not model.bert.encoder.layer[0].attention.self.query.weight.any()
        assert not model.bert.embeddings.word_embeddings.weight.any()
        assert torch.equal(model.classifier.weight, expert.classifier.weight)


def test_what_transformers_fuses_is_shared_too():
    """Heads beside a mixture of experts, whose tensors are one in the live model and many in the files."""
    from bmm_engine.pipeline.live import share_parameters

    mixtral = replace(architectures.ARCHITECTURES["mixtral"], cls="MixtralForSequenceClassification")
    base = mixtral.make()
    experts = [fine_tune(base, seed) for seed in (1, 2)]
    alignment = make_plan(
        MergeSettings(gram_source="task_vectors", keep_base=("score.*",)), Models.open(base, experts), Statistics()
    ).alignment
    live = share_parameters(alignment, [(f"task {i}", i, lambda e=e: copy.deepcopy(e)) for i, e in enumerate(experts)])
    live.load({name: alignment.base.load(name) for name in alignment.merged})
    for model in live.models.values():
        assert torch.equal(model.model.layers[1].mlp.experts.down_proj, base.model.layers[1].mlp.experts.down_proj)
    live.load({name: torch.zeros(alignment.base.spec(name).shape) for name in alignment.merged})
    for model in live.models.values():
        assert not any(p.any() for p in model.model.parameters())

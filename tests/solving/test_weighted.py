"""The solve in which errors of some outputs matter more than others."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bmm_engine as bmm
from bmm_engine.errors import (
    ConfigError,
    GramMismatchError,
    NotPositiveDefiniteError,
    NumericalWarning,
    ShapeMismatchError,
)
from bmm_engine.solving import weighted
from bmm_engine.solving.moments import DenseMoment
from bmm_engine.solving.output_metric import OutputMetric, output_metrics
from bmm_engine.solving.solve import factorize
from tests.numerics import relative_error
from tests.reference_merge import reference_merge
from tests.reference_sequential import reference_sequential
from tests.sequential.test_merge import ARCHITECTURES, assert_close, body, problem
from tests.sequential.test_merge import double as double_batches
from tests.sequential.test_solve import rows
from tests.tiny import fine_tune, make_base, make_batches


def moments_of(g, tasks, width, dtype=torch.float64):
    """Drifted rows of each task and their moments; what the expert reads, what the merged network reads."""
    own = [rows(g, 20 + 5 * t, width, dtype=dtype) for t in range(tasks)]
    merged = [x + 0.3 * rows(g, *x.shape, dtype=dtype) for x in own]
    measured = [bmm.DriftAccumulator(width, dtype=dtype) for _ in own]
    for accumulator, x, y in zip(measured, own, merged):
        accumulator.update(x, y)
    return own, merged, [accumulator.moments() for accumulator in measured]


def double(tensors):
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def metric_of(g, outputs, dtype=torch.float64):
    """Of few directions, as sensitivities are."""
    root = rows(g, outputs, 2, dtype=dtype)
    return output_metrics([root @ root.mT], 0.9, "module")[0].dense()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0.0, 5.0]),
    st.sampled_from([0.0, 0.5]),
)
def test_it_is_the_minimum_of_the_weighted_objective(seed, tasks, width, outputs, gamma, share):
    g = torch.Generator().manual_seed(seed)
    own, merged, moments = moments_of(g, tasks, width)
    base, anchor, *experts = (rows(g, outputs, width) for _ in range(2 + tasks))
    metrics = [metric_of(g, outputs) for _ in experts]
    options = {"task_weights": "energy", "mean_weight": gamma, "hybrid": share, "base": base}
    found = bmm.solve_drift(anchor, experts, moments, alpha=0.05, metrics=metrics, **options)
    energies = [
        float(torch.trace(x @ (w - base).T @ s @ (w - base) @ x.T)) / len(x) for x, w, s in zip(own, experts, metrics)
    ]
    betas = [tasks / e / sum(1 / k for k in energies) for e in energies]
    assert found.task_weights == pytest.approx(betas, rel=1e-8)
    # Dense: vec of rows, Z -> S Z A is kron(S, A).
    along = [
        share / (1 - share) * float(y.square().sum()) / len(y) * u.T @ u / u.square().sum()
        for y, u in zip(merged, (w - base for w in experts))
    ]
    grams = [y.T @ y / len(y) + gamma * torch.outer(y.mean(0), y.mean(0)) + p for y, p in zip(merged, along)]
    crosses = [
        (x @ w.T).T @ y / len(y) + gamma * torch.outer((x @ w.T).mean(0), y.mean(0)) + w @ p
        for x, y, w, p in zip(own, merged, experts, along)
    ]
    a0 = sum(b * a for b, a in zip(betas, grams))
    lam = 0.05 * a0.trace() / width
    mean = sum(b * s for b, s in zip(betas, metrics)) / sum(betas)
    left = sum(b * torch.kron(s, a) for b, s, a in zip(betas, metrics, grams))
    left += lam * torch.kron(mean, torch.eye(width, dtype=torch.float64))
    right = sum(b * s @ c for b, s, c in zip(betas, metrics, crosses)) + lam * mean @ anchor
    truth = torch.linalg.solve(left, right.reshape(-1)).view(outputs, width)
    assert relative_error(found.weight, truth) < 1e-8
    for weight, values in ((anchor, found.before), (truth, found.after)):
        expected = [float((y @ weight.T - x @ w.T).square().sum()) / len(y) for x, y, w in zip(own, merged, experts)]
        assert values == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_metrics_change_nothing(dtype):
    g = torch.Generator().manual_seed(0)
    _, _, moments = moments_of(g, 3, 8, dtype)
    base, anchor, *experts = (rows(g, 5, 8, dtype=dtype) for _ in range(5))
    metric = metric_of(g, 5, dtype)
    options = {"alpha": 0.05, "base": base, "mean_weight": 2.0}
    plain = bmm.solve_drift(anchor, experts, moments, **options)
    same = bmm.solve_drift(anchor, experts, moments, metrics=[metric] * 3, **options)
    assert relative_error(same.weight, plain.weight.double()) < (1e-9 if dtype == torch.float64 else 1e-4)
    assert same.ridge == plain.ridge


@pytest.mark.parametrize(
    ("filter", "directions", "kept"),
    [("truncated", 3, 3), ("ridge", 4, 4), ("truncated", None, None), ("truncated", 0.5, 4), ("ridge", 1.0, 8)],
)
def test_within_the_directions_that_a_filter_keeps_it_is_the_minimum(filter, directions, kept):
    """Of the weighted objective over Z = Y Q_K^T, with a ridge or none."""
    g = torch.Generator().manual_seed(4)
    own, merged, moments = moments_of(g, 3, 8)
    anchor, *experts = (rows(g, 5, 8) for _ in range(4))
    metrics = [metric_of(g, 5) for _ in experts]
    options = {"alpha": 0.9, "filter": filter, "directions": directions}
    found = bmm.solve_drift(anchor, experts, moments, metrics=metrics, **options)
    grams = [y.T @ y / len(y) for y in merged]
    a0 = sum(grams)
    lam = 0.9 * a0.trace() / 8
    u, s, _ = torch.linalg.svd(a0)
    kept = int((s > lam).sum()) if kept is None else kept
    assert kept
    q = u[:, :kept]
    ridge = lam if filter == "ridge" else 0.0
    # Of rows: d/dY of the objective at W_a + Y Q^T.
    left = sum(torch.kron(m, q.T @ a @ q) for m, a in zip(metrics, grams))
    left += ridge * torch.kron(sum(metrics) / 3, torch.eye(kept, dtype=torch.float64))
    crosses = [(x @ w.T).T @ y / len(y) for x, y, w in zip(own, merged, experts)]
    right = sum(m @ (c - anchor @ a) for m, c, a in zip(metrics, crosses, grams)) @ q
    truth = anchor + torch.linalg.solve(left, right.reshape(-1)).view(5, kept) @ q.T
    assert relative_error(found.weight, truth) < 1e-9
    same = bmm.solve_drift(anchor, experts, moments, metrics=[metrics[0]] * 3, **options)
    assert relative_error(same.weight, bmm.solve_drift(anchor, experts, moments, **options).weight) < 1e-9
    assert (found.ridge, found.jitter) == (pytest.approx(float(lam)), 0.0)


def few_directions(g, tasks, outputs, rank, dtype=torch.float64):
    """Metrics of few directions, the first of which all share, and of levels that differ."""
    common = rows(g, outputs, 1, dtype=dtype)
    return [
        OutputMetric(0.2 + 0.3 * t, torch.cat([common, rows(g, outputs, rank - 1, dtype=dtype)], 1))
        for t in range(tasks)
    ]


@pytest.mark.parametrize(("options", "kept"), [({}, 6), ({"filter": "truncated", "directions": 4}, 4)])
def test_of_few_directions_it_is_the_dense_solution_and_that_of_the_whole_problem(monkeypatch, options, kept):
    g = torch.Generator().manual_seed(5)
    own, merged, moments = moments_of(g, 3, 6)
    anchor, *experts = (rows(g, 20, 6) for _ in range(4))
    metrics = few_directions(g, 3, 20, 3)
    assert weighted.span(metrics).shape == (20, 7)
    betas, split, solve = [0.5, 1.0, 1.5], [], weighted._solve_split
    monkeypatch.setattr(weighted, "_solve_split", lambda *args: split.append(args) or solve(*args))
    found = bmm.solve_drift(anchor, experts, moments, alpha=0.1, metrics=metrics, task_weights=betas, **options)
    dense = [b * (m.level * torch.eye(20).double() + m.directions @ m.directions.T) for m, b in zip(metrics, betas)]
    grams = [y.T @ y / len(y) for y in merged]
    a0 = sum(b * a for b, a in zip(betas, grams))
    q = torch.linalg.eigh(a0).eigenvectors[:, -kept:]
    ridge = 0.0 if options else 0.1 * a0.trace() / 6
    left = sum(torch.kron(s, q.T @ a @ q) for s, a in zip(dense, grams))
    left += ridge * torch.kron(sum(dense) / 3, torch.eye(kept).double())
    crosses = [(x @ w.T).T @ y / len(y) for x, y, w in zip(own, merged, experts)]
    right = sum(s @ (c - anchor @ a) for s, c, a in zip(dense, crosses, grams)) @ q
    truth = anchor + torch.linalg.solve(left, right.reshape(-1)).view(20, kept) @ q.T
    assert relative_error(found.weight, truth) < 1e-9
    assert len(split) == 1
    monkeypatch.setattr(weighted, "NARROW", 0.0)
    whole = bmm.solve_drift(anchor, experts, moments, alpha=0.1, metrics=metrics, task_weights=betas, **options)
    assert relative_error(whole.weight, truth) < 1e-9
    assert len(split) == 1


def test_without_any_direction_it_is_the_solve_of_outputs_alike():
    g = torch.Generator().manual_seed(5)
    _, _, moments = moments_of(g, 2, 6)
    anchor, *experts = (rows(g, 20, 6) for _ in range(3))
    metrics = [OutputMetric(1.0, torch.zeros(20, columns).double()) for columns in (0, 3)]
    found = bmm.solve_drift(anchor, experts, moments, alpha=0.1, metrics=metrics)
    assert relative_error(found.weight, bmm.solve_drift(anchor, experts, moments, alpha=0.1).weight) < 1e-12


def test_few_directions_in_float32():
    g = torch.Generator().manual_seed(5)
    own, merged, moments = moments_of(g, 3, 6, torch.float32)
    anchor, *experts = (rows(g, 20, 6, dtype=torch.float32) for _ in range(4))
    metrics = few_directions(g, 3, 20, 3, torch.float32)
    found = bmm.solve_drift(anchor, experts, moments, alpha=0.1, metrics=metrics)
    measured = [bmm.DriftAccumulator(6, dtype=torch.float64) for _ in own]
    for accumulator, x, y in zip(measured, own, merged):
        accumulator.update(x.double(), y.double())
    truth = bmm.solve_drift(
        anchor.double(),
        [w.double() for w in experts],
        [accumulator.moments() for accumulator in measured],
        alpha=0.1,
        metrics=[OutputMetric(m.level, m.directions.double()) for m in metrics],
    )
    assert found.weight.dtype == torch.float32
    assert relative_error(found.weight, truth.weight) < 3e-3


def test_an_input_that_only_a_task_without_a_level_sees_is_solved_as_a_whole():
    """What all outputs have in common is singular there; what they have by their directions is not."""
    g = torch.Generator().manual_seed(6)
    grams = [torch.diag(torch.tensor(d).double()) for d in ([1.0, 2.0, 0.0], [0.0, 1.0, 3.0])]
    metrics = [OutputMetric(1.0, rows(g, 8, 1)), OutputMetric(0.0, rows(g, 8, 2))]
    toward = [rows(g, 8, 3) @ a for a in grams]
    moments = [DenseMoment(a) for a in grams]
    (factor,) = factorize([moments], [[1.0, 1.0]], ridge=0.0)
    z = weighted.solve_toward(toward, moments, factor, metrics, torch.float64, "module")
    dense = [metric.dense() for metric in metrics]
    left = sum(s @ z @ a for s, a in zip(dense, grams))
    assert relative_error(left, sum(s @ r for s, r in zip(dense, toward))) < 1e-9


def test_of_no_direction_nothing_moves_and_gradient_descent_is_refused():
    g = torch.Generator().manual_seed(4)
    _, _, moments = moments_of(g, 2, 4)
    anchor, *experts = (rows(g, 3, 4) for _ in range(3))
    metrics = [metric_of(g, 3), metric_of(g, 3)]
    still = bmm.solve_drift(anchor, experts, moments, alpha=100.0, filter="truncated", metrics=metrics)
    assert torch.equal(still.weight, anchor)
    with pytest.raises(ConfigError, match=r"'exponential' is for outputs that count alike.*output_weights: none"):
        bmm.solve_drift(anchor, experts, moments, alpha=0.1, filter="exponential", metrics=metrics)


def test_what_each_task_depends_on_is_kept_for_it():
    """Two experts that disagree everywhere, each of which matters in one output: each output follows the expert to which it matters."""
    g = torch.Generator().manual_seed(1)
    _, _, moments = moments_of(g, 2, 6)
    for own in moments:
        own.cross.zero_()  # no drift
        own.drift.zero_()
    experts = [rows(g, 2, 6), rows(g, 2, 6)]
    metrics = [
        output_metrics([torch.diag(torch.tensor(d).double())], 0.999, "m")[0].dense() for d in ([1.0, 0.0], [0.0, 1.0])
    ]
    found = bmm.solve_drift(torch.zeros(2, 6).double(), experts, moments, alpha=1e-6, metrics=metrics)
    truth = torch.stack([experts[0][0], experts[1][1]])
    assert relative_error(found.weight, truth) < 0.01
    plain = bmm.solve_drift(torch.zeros(2, 6).double(), experts, moments, alpha=1e-6)
    assert relative_error(plain.weight, truth) > 0.2


def test_both_ways_to_measure_give_the_same():
    g = torch.Generator().manual_seed(2)
    own, merged, moments = moments_of(g, 2, 6)
    base, anchor, *experts = (rows(g, 3, 6) for _ in range(4))
    metrics = [metric_of(g, 3), metric_of(g, 3)]
    options = {"alpha": 0.05, "task_weights": "energy", "base": base, "metrics": metrics}
    truth = bmm.solve_drift(anchor, experts, moments, **options)

    def projected(whole):
        found = [bmm.ProjectedAccumulator(w, w - base, whole_change=whole, dtype=torch.float64) for w in experts]
        for accumulator, x, y in zip(found, own, merged):
            accumulator.update(x, y)
        return [accumulator.moments() for accumulator in found]

    same = bmm.solve_drift(anchor, experts, projected(True), **options)
    assert relative_error(same.weight, truth.weight) < 1e-8
    assert same.task_weights == pytest.approx(truth.task_weights, rel=1e-9)
    with pytest.raises(ConfigError, match="without `whole_change`"):
        bmm.solve_drift(anchor, experts, projected(False), **options)


def test_metrics_have_a_mean_eigenvalue_of_one_over_the_modules_weighed_together():
    small, large = torch.eye(2).double(), 3 * torch.eye(4).double()
    a, b = (metric.dense() for metric in output_metrics([small, large], 0.5, "m"))
    assert (a.trace() + b.trace()) / 6 == pytest.approx(1)
    assert (b[0, 0] - 0.5) / (a[0, 0] - 0.5) == pytest.approx(3)
    assert torch.equal(output_metrics([torch.zeros(3, 3)], 0.5, "m")[0].dense(), torch.eye(3))
    assert relative_error(output_metrics([large], 0.0, "m")[0].dense(), torch.eye(4).double()) < 1e-15


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.floats(0.0, 3.0))
def test_a_metric_is_the_matrix_it_is_made_of(seed, outputs, level):
    """All of it, or the largest eigenvalues with the mean of the others in their place."""
    g = torch.Generator().manual_seed(seed)
    root = rows(g, outputs, outputs + 1)
    matrix = root @ root.mT + level * torch.eye(outputs).double()
    x = rows(g, outputs, 3)
    whole = OutputMetric.of(matrix)
    assert relative_error(whole.dense(), matrix) < 1e-12
    assert relative_error(whole.times(x), matrix @ x) < 1e-12
    assert relative_error(whole.scaled(3.0, 2.0).dense(), 3 * matrix + 2 * torch.eye(outputs).double()) < 1e-12
    values = torch.linalg.eigvalsh(matrix)
    for rank in range(1, outputs):
        found = OutputMetric.of(matrix, rank)
        assert found.directions.shape == (outputs, rank)
        assert found.dense().trace() == pytest.approx(float(matrix.trace()))
        best = values.clone()
        best[: outputs - rank] = values[: outputs - rank].mean()
        gap = torch.linalg.eigvalsh(found.dense()) - best
        assert float(gap.abs().max()) < 0.2 * float(values[-1])
        assert float(torch.linalg.eigvalsh(found.dense())[0]) >= -1e-9


def test_few_directions_of_a_wide_module_are_found_exactly():
    g = torch.Generator().manual_seed(0)
    root = rows(g, 300, 20)
    matrix = root @ root.mT
    for rank in (20, 128):
        assert relative_error(OutputMetric.of(matrix, rank).dense(), matrix) < 1e-12
        assert relative_error(OutputMetric.of(matrix.float(), rank).dense(), matrix) < 1e-5
    matrix += 0.1 * torch.eye(300).double()  # the iteration's error goes with the ratio of the eigenvalues
    assert relative_error(OutputMetric.of(matrix, 20).dense(), matrix) < 1e-5


def test_what_cannot_be_weighed_is_refused_and_a_solve_cut_short_is_told(monkeypatch):
    g = torch.Generator().manual_seed(0)
    _, _, moments = moments_of(g, 2, 4)
    anchor, *experts = (rows(g, 3, 4) for _ in range(3))
    metrics = [metric_of(g, 3), metric_of(g, 3)]
    with pytest.raises(ConfigError, match="2 experts and 1 metrics"):
        bmm.solve_drift(anchor, experts, moments, alpha=0.1, metrics=metrics[:1])
    with pytest.raises(ShapeMismatchError, match=r"a metric of 2 outputs for 3"):
        bmm.solve_drift(anchor, experts, moments, alpha=0.1, metrics=[metrics[0], torch.eye(2)])
    with pytest.raises(
        NotPositiveDefiniteError, match="module: the mean of its output metrics is not positive definite"
    ):
        bmm.solve_drift(anchor, experts, moments, alpha=0.1, metrics=[0 * m for m in metrics])
    with pytest.raises(ConfigError, match="a metric of 3 outputs has the eigenvalue -"):
        bmm.solve_drift(anchor, experts, moments, alpha=0.1, metrics=[-m for m in metrics])
    for share in (1.0, -0.1, True, "much"):
        with pytest.raises(ConfigError, match="share of a sensitivity"):
            output_metrics([metrics[0]], share, "m")
    monkeypatch.setattr(weighted, "STEPS", 1)
    with pytest.warns(NumericalWarning, match="stopped at a relative residual"):
        bmm.solve_drift(anchor, experts, moments, alpha=0.1, metrics=metrics, name="layer")


def hybrid_of(sensitivities):
    """The task vectors' part at the default of 8 samples, beside sets of equally many."""
    (samples,) = {own.samples for own in sensitivities}
    assert samples > 0
    return 8 / (8 + samples)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"energy": True, "fit_bias": True, "scale": 1.2}, {"gram_source": "task_vectors"}, {"gram_source": "hybrid"}],
    ids=["data", "energy, biases", "data-free", "hybrid"],
)
def test_a_plain_merge_is_the_formula(architecture, options):
    base = make_base(architecture)
    experts = [fine_tune(base, seed, 0.3 * seed).double() for seed in (1, 2)]
    base = base.double()
    batches = [double_batches(make_batches(architecture, 10 + t)) for t in range(2)]
    sensitivities = [bmm.collect_sensitivity(e, b, progress=False) for e, b in zip(experts, batches)]
    truth = reference_merge(
        base,
        experts,
        batches,
        alpha=0.1,
        sensitivities=[own.tensors for own in sensitivities],
        sensitivity_share=0.6,
        output_hybrid=hybrid_of(sensitivities),
        **options,
    )
    source = options.get("gram_source", "data")
    grams = [bmm.collect_grams(e, b, progress=False) for e, b in zip(experts, batches)]
    found = bmm.merge(
        base,
        experts,
        alpha=0.1,
        grams="task_vectors" if source == "task_vectors" else grams,
        hybrid=0.5 if source == "hybrid" else None,
        task_weights="energy" if options.get("energy") else None,
        fit_bias=options.get("fit_bias", False),
        scale=options.get("scale", 1.0),
        sensitivities=sensitivities,
        sensitivity_share=0.6,
        progress=False,
    ).tensors
    assert_close(found, truth.state_dict(), 1e-6)
    plain = bmm.merge(base, experts, alpha=0.1, grams=grams, progress=False).tensors
    assert max(relative_error(plain[name], found[name]) for name in body(found)) > 1e-3


def test_a_plain_merge_of_one_expert_is_the_expert_and_a_draw_is_refused(weighed):
    base, experts, batches, sensitivities = weighed
    grams = [bmm.collect_grams(experts[0], batches[0], progress=False)]
    options = {"grams": grams, "sensitivities": sensitivities[:1], "alpha": 1e-6, "progress": False}
    merged = bmm.merge(base, experts[:1], **options).tensors
    assert_close(merged, double(experts[0].state_dict()), 1e-3)
    with pytest.raises(ConfigError, match="outputs that count alike"):
        bmm.merge(base, experts[:1], posterior=bmm.Posterior(temperature=1.0), **options)
    with pytest.raises(ConfigError, match="1 experts and 2 sensitivities"):
        bmm.merge(base, experts[:1], **{**options, "sensitivities": sensitivities})
    with pytest.raises(ConfigError, match="search in the mode sequential"):
        bmm.search(base, experts, lambda model, task: 1.0, sensitivities=sensitivities)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_formula_walked_through_the_network(architecture):
    base, experts, batches = problem(architecture)
    base, *experts = (m.double() for m in (base, *experts))
    batches = [double_batches(own) for own in batches]
    sensitivities = [bmm.collect_sensitivity(e, b, progress=False) for e, b in zip(experts, batches)]
    options = {"alpha": 0.1, "mean_weight": 2.0}
    truth = reference_sequential(
        base,
        experts,
        batches,
        sensitivities=[own.tensors for own in sensitivities],
        share=0.6,
        output_hybrid=hybrid_of(sensitivities),
        **options,
    )
    found = bmm.merge_sequential(
        base, experts, batches, sensitivities=sensitivities, sensitivity_share=0.6, progress=False, **options
    )
    assert_close(found.tensors, truth, 1e-6)


@pytest.fixture(scope="module")
def weighed():
    """A tiny BERT with a classifier, two fine-tunes of it, their calibration and sensitivities."""
    base = make_base("bert")
    experts = [fine_tune(base, seed, 0.05 * seed) for seed in (1, 2)]
    batches = [make_batches("bert", 10 + t) for t in range(2)]
    found = [bmm.collect_sensitivity(e, b, progress=False) for e, b in zip(experts, batches)]
    return base, experts, batches, found


def test_one_expert_or_equal_ones_give_the_expert(weighed):
    base, experts, batches, sensitivities = weighed
    options = {"alpha": 1e-6, "progress": False}
    for count in (1, 2):
        merged = bmm.merge_sequential(
            base, experts[:1] * count, batches[:1] * count, sensitivities=sensitivities[:1] * count, **options
        )
        assert_close(merged.tensors, double(experts[0].state_dict()), 1e-3)


def test_a_share_of_zero_weighs_all_outputs_alike_and_another_does_not(weighed):
    base, experts, batches, sensitivities = weighed
    plain = bmm.merge_sequential(base, experts, batches, progress=False).tensors
    alike, weighted_most = (
        bmm.merge_sequential(
            base, experts, batches, sensitivities=sensitivities, sensitivity_share=share, progress=False
        ).tensors
        for share in (0.0, 0.9)
    )
    assert_close(alike, double(plain), 1e-3)
    assert max(relative_error(weighted_most[name], plain[name].double()) for name in body(plain)) > 0.01


def test_it_is_nearer_to_what_the_experts_predict(weighed):
    base, experts, batches, sensitivities = weighed
    model = copy.deepcopy(base).eval()

    @torch.no_grad()
    def distance(tensors):
        model.load_state_dict(tensors)
        gaps = [
            float((model(**b).logits - expert(**b).logits).square().sum())
            for expert, own in zip(experts, batches)
            for b in own
        ]
        return sum(gaps)

    plain = bmm.merge_sequential(base, experts, batches, progress=False).tensors
    weighted_tensors = bmm.merge_sequential(base, experts, batches, sensitivities=sensitivities, progress=False).tensors
    head = {k: v for k, v in plain.items() if k.startswith("classifier")}
    assert distance({**weighted_tensors, **head}) < distance(plain)


def test_sensitivities_of_another_model_and_too_few_are_refused(weighed):
    base, experts, batches, sensitivities = weighed
    with pytest.raises(GramMismatchError, match="measured on another model"):
        bmm.merge_sequential(base, experts, batches, sensitivities=sensitivities[::-1], progress=False)
    with pytest.raises(ConfigError, match="2 experts and 1 sensitivities"):
        bmm.merge_sequential(base, experts, batches, sensitivities=sensitivities[:1], progress=False)

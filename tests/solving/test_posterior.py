"""Draws from the posterior, against its mean and covariance, and against `W* + tau Z L^{-1}` written out on whole merges."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine import collect_grams, merge
from bmm_engine.errors import ConfigError, NumericalWarning
from bmm_engine.solving.moments import DenseMoment, TaskVectorMoment
from bmm_engine.solving.posterior import Posterior, posterior_sample, residual_variance, sample_posterior
from bmm_engine.solving.solve import factorize, solve_map
from tests.numerics import relative_error
from tests.reference_merge import linear_names, module_inputs
from tests.tiny import family, fine_tune, make_base, make_batches, save


def problem(out=3, width=5, tasks=2, seed=0, dtype=torch.float64):
    """Anchor, experts and strongly correlated Grams."""
    generator = torch.Generator().manual_seed(seed)
    anchor = torch.randn(out, width, generator=generator, dtype=dtype)
    experts = [anchor + torch.randn(out, width, generator=generator, dtype=dtype) for _ in range(tasks)]
    mix = torch.randn(width, width, generator=generator, dtype=dtype) * torch.logspace(0, -1, width, dtype=dtype)
    rows = [torch.randn(4 * width, width, generator=generator, dtype=dtype) @ mix for _ in range(tasks)]
    return anchor, experts, [x.mT @ x / len(x) for x in rows]


def variance(weight, experts, grams, betas):
    """sigma^2, written out."""
    loss = sum(b * ((weight - w) @ g @ (weight - w).mT).trace() for b, w, g in zip(betas, experts, grams))
    return float(loss) / (weight.shape[0] * sum(betas))


def test_mean_and_covariance_of_many_draws():
    anchor, experts, grams = problem()
    betas, alpha, temperature, draws = (1.0, 0.4), 0.1, 0.7, 4000
    exact = solve_map(anchor, experts, grams, alpha=alpha, task_weights=betas)
    a = sum(b * g for b, g in zip(betas, grams))
    a = a + alpha * a.trace() / 5 * torch.eye(5, dtype=torch.float64)
    tau = temperature * math.sqrt(variance(exact.weight, experts, grams, betas))
    # 40 draws of a module that is 100 times the small one, one below the other: more rows than a block has.
    tall = [t.repeat(100, 1) for t in (anchor, *experts)]
    found = [
        sample_posterior(
            tall[0], tall[1:], grams, Posterior(3, i, temperature), alpha=alpha, task_weights=betas, name="m"
        )
        for i in range(draws // 100)
    ]
    assert found[0].tau == pytest.approx([tau], rel=1e-12)
    rows = torch.cat([f.weight.reshape(100, -1) for f in found])
    # Rows of W are independent: blocks of tau^2 A^{-1} on the diagonal.
    truth = torch.block_diag(*[tau**2 * torch.linalg.inv(a)] * 3)
    variances = truth.diagonal()
    mean_error = (rows.mean(0) - exact.weight.flatten()) / (variances / draws).sqrt()
    assert mean_error.abs().max() < 4
    # Of an entry of a Wishart matrix the variance is (S_ij^2 + S_ii S_jj) / n.
    deviation = ((truth**2 + variances[:, None] * variances) / draws).sqrt()
    assert ((torch.cov(rows.mT) - truth) / deviation).abs().max() < 4.5


@pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "read for each use"])
def test_blocks_of_rows_and_threads(lazy):
    anchor, experts, grams = problem(out=600, width=70)
    factor = factorize([[DenseMoment(g) for g in grams]], [(1.0, 2.0)], alpha=0.05)[0]
    moments = [DenseMoment((lambda g=g: g) if lazy else g, width=70) for g in grams]
    a = grams[0] + 2 * grams[1]
    a = a + 0.05 * a.trace() / 70 * torch.eye(70, dtype=torch.float64)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sigma2 = residual_variance(anchor, experts, moments, (1.0, 2.0))
        found.append((sigma2, posterior_sample(anchor, factor, 0.3, Posterior(1).generator("m"))))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0] == pytest.approx(variance(anchor, experts, grams, (1.0, 2.0)), rel=1e-12)
    z = torch.linalg.multi_dot([found[0][1] - anchor, torch.linalg.cholesky(a)]) / 0.3
    # What is left are standard normal numbers, each its own: no block repeats another's.
    assert abs(float(z.mean())) < 4 / math.sqrt(z.numel())
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / z.numel())
    assert not torch.allclose(z[:256], z[256:512])


@given(scale=st.sampled_from([1e-6, 1.0, 1e4]), weight=st.sampled_from([0.01, 1.0, 50.0]), seed=st.integers(0, 5))
def test_noise_knows_no_unit_of_grams_and_falls_with_the_root_of_weights(scale, weight, seed):
    anchor, experts, grams = problem(seed=seed)
    mode = solve_map(anchor, experts, grams, alpha=0.1).weight
    own = sample_posterior(anchor, experts, grams, Posterior(seed), alpha=0.1)
    other = sample_posterior(
        anchor, experts, [scale * g for g in grams], Posterior(seed), alpha=0.1, task_weights=[weight] * 2
    )
    torch.testing.assert_close((other.weight - mode) * weight**0.5, own.weight - mode, rtol=1e-8, atol=1e-10)


def test_where_experts_agree_a_draw_is_the_map():
    anchor, experts, grams = problem()
    same = [experts[0]] * 3
    found = sample_posterior(experts[0], same, [*grams, grams[0]], Posterior(0, 0, 5.0), alpha=0.1)
    assert found.tau == [0.0]
    assert torch.equal(found.weight, experts[0])
    assert torch.equal(sample_posterior(anchor, experts, grams, Posterior(0), alpha=math.inf).weight, anchor)


def test_members_of_a_batch_have_streams_of_their_own():
    anchor, experts, grams = problem()
    stacked = [torch.stack([t, t]) for t in (anchor, *experts, *grams)]
    found = sample_posterior(stacked[0], stacked[1:3], stacked[3:], Posterior(2), alpha=0.1, name="m")
    alone = sample_posterior(anchor, experts, grams, Posterior(2), alpha=0.1, name="m[1]")
    assert torch.equal(found.weight[1], alone.weight)
    assert not torch.allclose(found.weight[0], found.weight[1])


def test_no_posterior_where_a_had_no_factor_of_its_own():
    anchor, experts, _ = problem()
    thin = torch.zeros(5, 5, dtype=torch.float64)
    thin[0, 0] = 1.0
    with (
        pytest.warns(NumericalWarning),
        pytest.raises(ConfigError, match=r"layer.*not positive definite at ridge 0.*larger alpha"),
    ):
        sample_posterior(anchor, experts, [thin, thin], Posterior(), alpha=0.0, name="layer")
    with pytest.warns(NumericalWarning):  # noqa: PT031
        mode = sample_posterior(anchor, experts, [thin, thin], Posterior(temperature=0.0), alpha=0.0)
        assert torch.equal(mode.weight, solve_map(anchor, experts, [thin, thin], alpha=0.0).weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "seed must be a whole number >= 0, not -1"),
        ({"index": 1.5}, "index must be a whole number >= 0, not 1.5"),
        ({"temperature": math.inf}, "temperature must be finite and >= 0"),
        ({"temperature": -0.1}, r"temperature must be finite and >= 0 \(0: the MAP\), not -0.1"),
        ({"temperature": math.nan}, "not nan"),
    ],
)
def test_what_is_no_posterior(given, message):
    with pytest.raises(ConfigError, match=message):
        Posterior(**given)


# Whole merges


def models(architecture, dtype=torch.float32):
    base = make_base(architecture).to(dtype)
    experts = [fine_tune(base, seed) for seed in (1, 2)]
    batches = [make_batches(architecture, 10 + t) for t in range(2)]
    return base, experts, batches, [collect_grams(e.float(), b) for e, b in zip(experts, batches)]


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("fit_bias", [False, True], ids=["weights", "with biases"])
def test_a_merged_draw_is_the_formula(architecture, fit_bias):
    base, experts, batches, grams = models(architecture)
    options = {"grams": grams, "alpha": 0.1, "scale": 1.3, "fit_bias": fit_bias, "dtype": "float64"}
    mode = merge(base, experts, **options)
    posterior = Posterior(5, 2, 0.5)
    drawn = merge(base, experts, posterior=posterior, **options)
    inputs = [module_inputs(e, b) for e, b in zip(experts, batches)]
    taus = {record.module: record.tau for record in drawn.modules}
    assert {record.tau for record in mode.modules} == {0.0}
    assert len(taus) == len(linear_names(base))

    def matrix(tensors, name, transposed):
        weight = tensors[f"{name}.weight"].double()
        weight = weight.mT if transposed else weight
        return torch.cat([weight, tensors[f"{name}.bias"].double()[:, None]], 1) if fit_bias else weight

    for name, transposed in linear_names(base).items():
        rows = [x[name] for x in inputs]
        rows = [torch.cat([x, x.new_ones(len(x), 1)], 1) if fit_bias else x for x in rows]
        found = [x.mT @ x / len(x) for x in rows]
        a = sum(found)
        a = a + 0.1 * a.trace() / len(a) * torch.eye(len(a), dtype=torch.float64)
        origin, weights = (
            matrix(base.state_dict(), name, transposed),
            [matrix(e.state_dict(), name, transposed) for e in experts],
        )
        best = origin + (matrix(mode.tensors, name, transposed) - origin) / 1.3
        tau = 0.5 * math.sqrt(variance(best, weights, found, (1.0, 1.0)))
        assert taus[name] == pytest.approx(tau, rel=1e-3), name
        z = torch.randn(best.shape, generator=posterior.generator(name), dtype=torch.float64)
        noise = 1.3 * tau * torch.linalg.solve(torch.linalg.cholesky(a), z, left=False)
        moved = matrix(drawn.tensors, name, transposed) - matrix(mode.tensors, name, transposed)
        # The MAP is rounded to float32, so the noise is known to that many units of the weight.
        assert relative_error(moved, noise) < 1e-3, name
        assert noise.abs().max() > 1e-3
    solved = {f"{name}.{part}" for name in taus for part in (("weight", "bias") if fit_bias else ("weight",))}
    for name, tensor in mode.tensors.items():
        assert torch.equal(tensor, drawn.tensors[name]) == (name not in solved), name


def test_temperature_zero_is_the_map_and_infinite_ridges_are_the_anchor():
    base, experts, _, grams = models("bert")
    alpha = [{"filter": "attention", "value": math.inf}, {"value": 0.05}]
    options = {"grams": grams, "alpha": alpha, "anchor": "ties"}
    mode = merge(base, experts, **options).tensors
    cold = merge(base, experts, posterior=Posterior(temperature=0.0), **options).tensors
    assert all(torch.equal(cold[name], tensor) for name, tensor in mode.items())
    warm = merge(base, experts, posterior=Posterior(), **options)
    anchor = merge(base, experts, grams=grams, alpha=math.inf, anchor="ties", posterior=Posterior()).tensors
    solved = {f"{record.module}.weight" for record in warm.modules}
    assert solved
    assert not any("attention" in name for name in solved)
    for name, tensor in warm.tensors.items():
        assert torch.equal(tensor, anchor[name]) == (name not in solved), name


def test_bits_do_not_depend_on_threads_shards_order_or_the_number_of_draws(tmp_path):
    base, _, base_path, paths = family("llama", tmp_path)
    grams = [
        collect_grams(type(base).from_pretrained(p), make_batches("llama", t)).save(tmp_path / f"{t}.safetensors")
        for t, p in enumerate(paths)
    ]
    options = {"grams": grams, "task_weights": "energy", "posterior": Posterior(7, 3)}
    first = merge(base_path, paths, **options).tensors
    torch.set_num_threads(1)
    sharded = [
        save(type(base).from_pretrained(p), tmp_path / f"sharded-{p.name}", max_shard_size="20KB")
        for p in (base_path, *paths)
    ]
    reversed_base = dict(reversed([(n, t) for n, t in base.state_dict().items() if n != "lm_head.weight"]))
    states = [type(base).from_pretrained(p).state_dict() for p in paths]
    for other in (
        merge(base_path, paths, **options).tensors,
        merge(sharded[0], sharded[1:], **options).tensors,
        merge(base_path, paths[::-1], **{**options, "grams": grams[::-1]}).tensors,
        merge(reversed_base, states, **options).tensors,
    ):
        assert all(torch.equal(other[name], first[name]) for name in reversed_base)
    for changed in (Posterior(7, 4), Posterior(8, 3)):
        other = merge(base_path, paths, **{**options, "posterior": changed}).tensors
        name = "model.layers.0.mlp.up_proj.weight"
        assert not torch.allclose(other[name], first[name])


def test_what_the_record_says(tmp_path):
    _, _, base, paths = family("bert", tmp_path)
    result = merge(base, paths, posterior=Posterior(4, 1, 0.2), output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "bmm_merge.json").read_text())["modules"]
    assert record["posterior"] == {"seed": 4, "index": 1, "temperature": 0.2}
    assert [m["tau"] for m in record["modules"]] == [m.tau for m in result.modules]
    assert all(m.tau > 0 for m in result.modules)
    assert merge(base, paths).summary()["posterior"] is None


def test_tau_of_task_vector_moments():
    anchor, experts, _ = problem(out=4, width=9)
    base = torch.zeros_like(anchor)
    grams = [(w - base).mT @ (w - base) / (w - base).pow(2).sum() for w in experts]
    moments = [TaskVectorMoment(w - base) for w in experts]
    found = residual_variance(anchor, experts, moments, (1.0, 1.0))
    assert found == pytest.approx(variance(anchor, experts, grams, (1.0, 1.0)), rel=1e-12)

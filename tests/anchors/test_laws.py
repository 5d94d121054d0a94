"""What every rule must obey, whatever its formula: on whole tiny models through `merge`, and on tensors of awkward shapes."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from bmm_engine import collect_fisher, collect_grams, collect_sensitivity, collect_sequential, merge
from bmm_engine.anchors import get_anchor, registered_anchors
from bmm_engine.anchors.contract import GRAMS
from tests.numerics import relative_error
from tests.tiny import family, fine_tune, make_base, make_batches, save

RULES = sorted(registered_anchors())
# Settings under which a rule that is idle by default does something, or a slow one is quick.
SETTINGS = {
    "breadcrumbs": {"density": 0.6},
    "breadcrumbs_ties": {"density": 0.6},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "sce": {"select_topk": 0.5},
    "doge_ta": {"steps": 5},
    "epimer": {"metric": "kfac", "coordinates": "exact"},
    "nearswap": {"t": 0.01},
    "wudi": {"steps": 20},
    "dc_merge": {"density": 0.3},
}
# One expert, or equal experts, is that expert (at a scaling of 1 where there is one).
RETURNS_THE_EXPERT = {
    "average": {},
    "task_arithmetic": {"scaling": 1.0},
    "karcher": {},
    "multislerp": {},
    "ties": {"density": 1.0},
    "magmax": {"scaling": 1.0},
    "ram": {"epsilon": 0.0},
    "sce": {},
    "passthrough": {},
    "slerp": {"t": 1.0},
    "regmean": {},
    "regmean_plusplus": {},
    "fisher": {},
    "tsv_m": {},
    "epimer": {"metric": "identity", "rank": 1000},
    "wudi": {"solver": "closed_form"},
    "opcm": {},
    "localize_and_stitch": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "scaling": 1.0},
    "breadcrumbs_ties": {"density": 1.0, "scaling": 1.0},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0, "trim": 1.0},
    "dc_merge": {"density": 1.0},
    "ace": {"center": False, "collective": False},
    "core_space": {},
}
# What experts agree on is summed, or cut to the directions that there are for each.
SUM = ("wudi", "tsv_m", "opcm", "task_arithmetic", "dare_linear", "breadcrumbs", "dc_merge", "core_space", "epimer")


def count(name, wanted=3):
    least, most = get_anchor(name).experts
    return max(least, min(wanted, most or wanted))


class Family:
    """A base, three fine-tunes, their Grams and Fisher information: made once for a kind of model."""

    def __init__(self, architecture):
        self.architecture = architecture
        self.base = make_base(architecture)
        self.experts = [fine_tune(self.base, seed) for seed in (1, 2, 3)]
        self.grams = [collect_grams(e, make_batches(architecture, t, 6)) for t, e in enumerate(self.experts)]
        self.fishers = [self.fisher(e, t) for t, e in enumerate(self.experts)]
        self.sensitivities = [
            collect_sensitivity(e, make_batches(architecture, t, 2)) for t, e in enumerate(self.experts)
        ]

    def sequential(self, experts, name, parameters):
        batches = [make_batches(self.architecture, t, 6) for t in range(len(experts))]
        return collect_sequential(self.base, experts, batches, anchor=name, **parameters)

    def fisher(self, model, seed):
        return collect_fisher(model, make_batches(self.architecture, seed, 1), labels="sampled")

    def merge(self, name, order=(0, 1, 2), **options):
        rule = get_anchor(name)
        order = order[: count(name)]
        options = {"anchor_parameters": SETTINGS.get(name, {}), "alpha": math.inf, **options}
        needs = rule.needs_of(options["anchor_parameters"])
        if "sequential_grams" in needs:
            options["grams"] = self.sequential([self.experts[t] for t in order], name, options["anchor_parameters"])
        for need in needs - {"sequential_grams"}:
            options[need] = [getattr(self, need)[t] for t in order]
        return merge(self.base, [self.experts[t] for t in order], anchor=name, **options).tensors


FAMILIES = {}


@pytest.fixture(params=["llama", "gpt2"])
def models(request):
    if request.param not in FAMILIES:
        FAMILIES[request.param] = Family(request.param)
    return FAMILIES[request.param]


def same(first, second):
    assert set(first) == set(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.mark.parametrize("name", RULES)
def test_a_merge_is_finite_complete_and_moves(name, models):
    merged = models.merge(name)
    state = models.base.state_dict()
    assert set(merged) == set(state)
    assert all(
        t.isfinite().all() and t.shape == state[n].shape and t.dtype == state[n].dtype for n, t in merged.items()
    )
    assert any(not torch.equal(t, state[n]) for n, t in merged.items())


@pytest.mark.parametrize("name", RULES)
def test_bits_depend_on_nothing_but_the_inputs(name, models, monkeypatch):
    torch.set_num_threads(2)
    first = models.merge(name)
    torch.set_num_threads(1)
    same(first, models.merge(name))
    monkeypatch.setattr("bmm_engine.merging.stream.SLAB_ELEMENTS", 37)
    monkeypatch.setattr("bmm_engine.parallel.IN_FLIGHT_BYTES", 1)
    torch.set_num_threads(2)
    same(first, models.merge(name))


# Wide enough for LAPACK, BLAS and torch's sums to use several threads, which must not show.
@pytest.mark.parametrize(
    "name", ["average", "karcher", "model_stock", "sce", "iso_c", "iso_cts", "tsv_m", "opcm", "dc_merge", "core_space"]
)
def test_bits_of_large_tensors_do_not_depend_on_threads_either(name):
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.w.weight": (320, 640), "layers.1.w.weight": (640, 320), "embed.weight": (3000, 128)}
    base = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    experts = [{k: w + 0.1 * torch.randn(w.shape, generator=generator) for k, w in base.items()} for _ in range(3)]
    merged = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        merged.append(merge(base, experts, anchor=name, modules=["layers.*"], alpha=math.inf).tensors)
    same(*merged)


# A sequential walk is one over experts in an order: its Grams differ in the last bits with it.
@pytest.mark.parametrize("name", [n for n in RULES if get_anchor(n).symmetric and n != "regmean_plusplus"])
def test_the_order_of_the_experts_does_not_matter_to_a_bit(name, models):
    options = dict(SETTINGS.get(name, {}))
    rule = get_anchor(name)
    if "weight" in rule.defaults:
        options["weight"] = [0.5, 1.0, 2.0][: count(name)]
    first = models.merge(name, anchor_parameters=options)
    if "weight" in options:
        options["weight"] = options["weight"][::-1]
    order = tuple(range(count(name)))[::-1]
    same(first, models.merge(name, order, anchor_parameters=options))


@pytest.mark.parametrize("name", sorted(RETURNS_THE_EXPERT))
def test_equal_experts_and_one_expert_are_that_expert(name, models):
    expert = models.experts[0]
    rule = get_anchor(name)
    needed = {}
    needs = rule.needs_of(RETURNS_THE_EXPERT[name])
    for number in {max(1, rule.experts[0]), count(name)}:
        if "sequential_grams" in needs:
            needed["grams"] = models.sequential([expert] * number, name, {})
        needed |= {need: [getattr(models, need)[0]] * number for need in needs - {"sequential_grams"}}
        if number > 1 and name in SUM:
            continue
        merged = merge(
            models.base,
            [expert] * number,
            anchor=name,
            anchor_parameters=RETURNS_THE_EXPERT[name],
            alpha=math.inf,
            **needed,
        )
        for key, tensor in expert.state_dict().items():
            if tensor.is_floating_point():
                assert relative_error(merged.tensors[key], tensor.double()) < 1e-5, key


@pytest.mark.parametrize("name", RULES)
def test_experts_that_are_the_base_change_nothing(name, models):
    rule = get_anchor(name)
    number = count(name)
    needs, needed = rule.needs_of(SETTINGS.get(name)), {}
    if "sequential_grams" in needs:
        needed["grams"] = models.sequential([models.base] * number, name, {})
    if "grams" in needs:
        needed["grams"] = [collect_grams(models.base, make_batches(models.architecture, 1, 6))] * number
    if "fishers" in needs:
        needed["fishers"] = [models.fisher(models.base, 1)] * number
    if "sensitivities" in needs:
        needed["sensitivities"] = [collect_sensitivity(models.base, make_batches(models.architecture, 1, 2))] * number
    merged = merge(
        models.base,
        [models.base] * number,
        anchor=name,
        anchor_parameters=SETTINGS.get(name, {}),
        alpha=math.inf,
        **needed,
    )
    for key, tensor in models.base.state_dict().items():
        torch.testing.assert_close(merged.tensors[key], tensor, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", RULES)
def test_a_solve_under_a_huge_ridge_is_the_rule(name, models):
    """The anchor of the Bayesian solve is the same rule on the same inputs, transposed weights included."""
    exact, near = models.merge(name), models.merge(name, alpha=1e9)
    for key, tensor in exact.items():
        torch.testing.assert_close(near[key], tensor, rtol=1e-5, atol=1e-6)


AWKWARD = [(), (1,), (7,), (99,), (1, 1), (1, 7), (7, 1), (5, 5), (3, 2, 2), (0,), (0, 3)]


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_tensors_of_awkward_shapes(name, shape, dtype):
    rule = get_anchor(name)
    if rule.scope == "module" and (len(shape) != 2 or 0 in shape):
        pytest.skip("a rule for matrices gets no other tensors")
    needs = rule.needs_of(SETTINGS.get(name))
    if "fishers" in needs and 0 in shape:
        pytest.skip("a whole model has Fisher information somewhere")
    if dtype == torch.bfloat16 and not rule.stored:
        pytest.skip("it gets tensors widened")
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator).to(dtype)
    experts = [(base + 0.1 * torch.randn(shape, generator=generator).to(dtype)) for _ in range(count(name))]
    copies = [t.clone() for t in (base, *experts)]
    extra = {}
    if needs & GRAMS and len(shape) == 2:
        extra["grams"] = [torch.eye(shape[1], dtype=torch.float64) * (t + 1) for t in range(len(experts))]
    if "sensitivities" in needs:
        extra["sensitivities"] = [torch.eye(shape[0]) * (t + 1) for t in range(len(experts))]
    if "fishers" in needs:
        extra["fishers"] = [torch.rand(shape, generator=generator).to(dtype) for _ in experts]
    merged = rule(base, experts, **SETTINGS.get(name, {}), **extra)
    assert merged.shape == base.shape
    assert merged.dtype in (torch.float32, torch.float64)
    assert merged.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(copies, (base, *experts))), "a rule must not write into its inputs"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_16_bit_models_are_computed_in_float32_and_rounded_once(name, dtype, models):
    if get_anchor(name).needs_of(SETTINGS.get(name)):
        pytest.skip("statistics are of the 16-bit model itself")
    import copy

    small = [copy.deepcopy(m).to(dtype) for m in (models.base, *models.experts[: count(name)])]
    wide = [copy.deepcopy(m).float() for m in small]
    options = {"anchor": name, "anchor_parameters": SETTINGS.get(name, {}), "alpha": math.inf}
    merged = merge(small[0], small[1:], **options).tensors
    exact = merge(wide[0], wide[1:], **options).tensors
    same(merged, {key: t.to(dtype) if t.is_floating_point() else t for key, t in exact.items()})


def test_integer_tensors_are_the_bases():
    base = {"w": torch.randn(4, 3), "steps": torch.tensor([3, 4])}
    experts = [{"w": torch.randn(4, 3), "steps": torch.tensor([9, 9])} for _ in range(2)]
    merged = merge(base, experts, anchor="dare_ties", alpha=math.inf).tensors
    assert torch.equal(merged["steps"], base["steps"])
    assert not torch.equal(merged["w"], base["w"])


def test_shards_do_not_matter(tmp_path):
    base, _, base_path, paths = family("llama", tmp_path, experts=3)
    sharded = [
        save(type(base).from_pretrained(p), tmp_path / f"sharded-{p.name}", max_shard_size="20KB")
        for p in (base_path, *paths)
    ]
    for name in ("ties", "della", "dare_ties", "tsv_m", "opcm"):
        options = {"anchor": name, "alpha": math.inf, "anchor_parameters": SETTINGS.get(name, {})}
        same(merge(base_path, paths, **options).tensors, merge(sharded[0], sharded[1:], **options).tensors)


def test_random_rules_give_the_same_bits_in_every_process():
    code = (
        "import hashlib, torch, math; from bmm_engine import merge\n"
        "g = torch.Generator().manual_seed(0)\n"
        "models = [{f'layer.{i}.w': torch.randn(40, 30, generator=g) for i in range(4)} for _ in range(4)]\n"
        "for name in ('dare_ties', 'della'):\n"
        "    t = merge(models[0], models[1:], anchor=name, anchor_parameters={'density': 0.5}, alpha=math.inf).tensors\n"
        "    print(hashlib.sha256(b''.join(v.numpy().tobytes() for v in t.values())).hexdigest())"
    )
    import os

    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert len(next(iter(outputs)).split()) == 2

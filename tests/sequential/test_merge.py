"""Sequential merges of whole models against a plain reference in float64, and the laws that they keep."""

from __future__ import annotations

import copy

import pytest
import torch

from bmm_engine import collect_grams, merge, merge_sequential
from tests.numerics import relative_error
from tests.reference_merge import linear_names
from tests.reference_sequential import reference_sequential
from tests.tiny import CONFIGS, family, fine_tune, make_base, make_batches

ARCHITECTURES = list(CONFIGS)


def double(batches):
    return [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]


def problem(architecture, experts=2):
    base = make_base(architecture)
    tuned = [fine_tune(base, seed + 1, 0.05 * (1 + seed)) for seed in range(experts)]
    return base, tuned, [make_batches(architecture, 10 + t) for t in range(experts)]


def body(tensors):
    return {k: v for k, v in tensors.items() if v.is_floating_point() and not k.startswith(("classifier", "lm_head", "score"))}


def assert_close(found, truth, tolerance):
    truth = truth.state_dict() if hasattr(truth, "state_dict") else truth
    for name, tensor in body(truth).items():
        assert relative_error(found[name], tensor) < tolerance, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [{}, {"fit_bias": False, "energy": False, "alpha": 0.01}, {"scale": 0.7, "alpha": 1.0}, {"sweeps": 2}],
    ids=["defaults", "plain", "scaled", "sweeps"],
)
def test_it_is_the_formula_walked_through_the_network(architecture, options):
    base, experts, batches = problem(architecture)
    truth = reference_sequential(base, experts, [double(b) for b in batches], **options)
    given = {k: v for k, v in options.items() if k != "energy"}
    weights = "energy" if options.get("energy", True) else None
    wide = [m.double() for m in (base, *experts)]
    result = merge_sequential(wide[0], wide[1:], [double(b) for b in batches], task_weights=weights, **given)
    assert_close(result.tensors, truth, 1e-9)
    narrow = [m.float() for m in wide]
    result = merge_sequential(narrow[0], narrow[1:], batches, task_weights=weights, **given)
    assert_close(result.tensors, truth, 1e-4)

"""How much a model's predictions depend on what each of its modules gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bmm_engine as bmm
from bmm_engine.errors import CheckpointError, CollectionError, EmptyCalibrationError, GramMismatchError
from tests.numerics import relative_error
from tests.tiny import fine_tune, make_base, make_batches


class Two(nn.Module):
    """x -> tanh(first) -> last: logits (batch, 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 5, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


def test_it_is_the_mean_of_the_jacobians_squared_in_expectation():
    model, x = Two(), torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = bmm.collect_sensitivity(model, [x.repeat(4000, 1)], modules=["first"], mask=None, progress=False).tensors[
        "first"
    ]
    slopes = 1 - torch.tanh(model.first(x)).square()  # (3, 5)
    jacobians = model.head.weight[None] * slopes[:, None, :]  # (3, classes, out)
    truth = (jacobians.mT @ jacobians).mean(0).detach()
    assert relative_error(found, truth) < 0.05
    assert relative_error(found, truth) > 0  # it is an estimate


def test_draws_do_not_depend_on_how_samples_are_batched():
    model, x = Two(), torch.randn(12, 4, dtype=torch.float64)
    whole, parts = (
        bmm.collect_sensitivity(model, list(x.split(n)), modules=["first"], mask=None, progress=False) for n in (12, 5)
    )
    assert relative_error(parts.get("first"), whole.get("first")) < 1e-12
    other = bmm.collect_sensitivity(model, [x], modules=["first"], mask=None, seed=1, progress=False)
    assert relative_error(other.get("first"), whole.get("first")) > 1e-3


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_padding_does_not_count_and_the_model_stays_as_it_was(architecture):
    model = make_base(architecture)
    before = copy.deepcopy(model.state_dict())
    frozen = next(model.parameters()).requires_grad_(False)
    model.train()
    batches = make_batches(architecture, 3)
    padded = [
        {
            k: torch.cat([v, torch.zeros_like(v[:, :3])], 1) if v.dim() == 2 and k != "labels" else v
            for k, v in b.items()
        }
        for b in batches
    ]
    found, same = (bmm.collect_sensitivity(model, own, progress=False) for own in (batches, padded))
    for name in found.names:
        assert relative_error(same.get(name), found.get(name).double()) < 1e-3, name
        assert torch.linalg.eigvalsh(found.get(name).double()).min() > -1e-9
    assert model.training
    assert not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_heads_are_left_out_and_a_bare_encoder_takes_one():
    model = make_base("bert")
    batches = make_batches("bert", 3)
    whole = bmm.collect_sensitivity(model, batches, progress=False)
    assert not any("classifier" in name for name in whole.names)
    with pytest.raises(CollectionError, match="Give the model with its head, or `logits`"):
        bmm.collect_sensitivity(model.bert, batches, progress=False)

    def logits(output, batch):
        return model.classifier(output.pooler_output)

    bare = bmm.collect_sensitivity(model.bert, batches, logits=logits, progress=False)
    for name in bare.names:
        assert relative_error(bare.get(name), whole.get(f"bert.{name}").double()) < 1e-4, name


def test_it_is_saved_opened_and_told_from_another_models(tmp_path):
    model = fine_tune(make_base("bert"), 1, 0.05)
    found = bmm.collect_sensitivity(model, make_batches("bert", 3), calibration="three", progress=False)
    opened = bmm.SensitivitySet.load(found.save(tmp_path / "s.safetensors"))
    assert sorted(opened.names) == sorted(found.names)
    assert opened.calibration == "three"
    assert opened.digest() == found.digest()
    name = found.names[0]
    assert torch.equal(opened.get(name), found.get(name))
    opened.check(name, model.get_submodule(name).weight, "expert")
    with pytest.raises(GramMismatchError, match="measured on another model than expert"):
        opened.check(name, 2 * model.get_submodule(name).weight, "expert")
    with pytest.raises(CheckpointError, match="no such sensitivity file"):
        bmm.SensitivitySet.load(tmp_path / "none.safetensors")


def test_what_cannot_be_measured_is_told():
    model = Two()
    with pytest.raises(EmptyCalibrationError, match="empty"):
        bmm.collect_sensitivity(model, [], mask=None, progress=False)
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    with pytest.raises(CollectionError, match="first: the logits' derivative"):
        bmm.collect_sensitivity(model, [torch.ones(2, 4).double()], modules=["first"], mask=None, progress=False)


def test_a_module_that_the_logits_do_not_depend_on_has_none():
    model = Two()
    model.unused = nn.Linear(2, 5).double()
    batches = [torch.ones(2, 4).double()]
    found = bmm.collect_sensitivity(model, batches, modules=["first", "unused"], mask=None, progress=False)
    assert torch.equal(found.get("unused"), torch.zeros(5, 5).double())
    assert found.get("first").trace() > 0
    with pytest.raises(EmptyCalibrationError, match="reaches none of the modules"):
        bmm.collect_sensitivity(model, batches, modules=["unused"], mask=None, progress=False)


def test_a_head_that_reads_nothing_measures_nothing():
    model = Two()
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.raises(CollectionError, match=r"depend on none of the 1 modules .*'first'.*trained head"):
        bmm.collect_sensitivity(model, [torch.ones(2, 4).double()], modules=["first"], mask=None, progress=False)

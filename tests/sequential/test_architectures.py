"""Architectures of transformers, each as a tiny random model: what a recipe with calibration and nothing else gives, and the mode plain."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bmm_engine.merging.merge import MergeResult
from bmm_engine.models.heads import body_of, output_embeddings
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from tests.architectures import ARCHITECTURES, Architecture
from tests.numerics import relative_error
from tests.reference_sequential import reference_sequential
from tests.tiny import fine_tune

SAMPLES = 20
# Linear modules that are not called as modules (a state space reads its weights), or only by what no sample reaches.
UNREACHED = {"mamba": "dt_proj", "falcon_mamba": "dt_proj", "jamba": "dt_proj", "esm": "contact_head"}
# The model itself cannot run in float64.
NARROW = {"xglm", "deberta", "qwen2_vl"}
# A router gives experts other rows in the merged network: solved on the experts' own rows, which the reference does not do.
ROUTED = {"switch_transformers"}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def saved(
    architecture: Architecture, folder: Path, *, equal: bool
) -> tuple[nn.Module, list[nn.Module], dict[str, Any]]:
    """A base, its two experts, and the recipe that names them and their calibration, and nothing else."""
    base = architecture.make()
    experts = [fine_tune(base, 1 if equal else 1 + t, 0.02) for t in range(2)]
    base.save_pretrained(folder / "base")
    raw: dict[str, Any] = {"base": str(folder / "base"), "experts": []}
    for t, expert in enumerate(experts):
        expert.save_pretrained(folder / f"expert-{t}")
        save_file(architecture.batch(10 + t, SAMPLES), folder / f"inputs-{t}.safetensors")
        raw["experts"].append(
            {"model": str(folder / f"expert-{t}"), "calibration": str(folder / f"inputs-{t}.safetensors")}
        )
    return base, experts, raw


def merged(raw: dict[str, Any], output: Path) -> tuple[MergeResult, dict[str, Tensor]]:
    result = run_recipe(Recipe.parse(raw), output, progress=False)
    return result, load_file(output / "model.safetensors")


def solved(result: MergeResult) -> set[str]:
    return {record.module for record in result.modules}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_equal_experts_give_the_expert(name: str, tmp_path: Path) -> None:
    _, _, raw = saved(ARCHITECTURES[name], tmp_path, equal=True)
    truth = load_file(tmp_path / "expert-0" / "model.safetensors")
    for mode in (None, "plain"):
        result, tensors = merged({**raw, "mode": mode}, tmp_path / f"out-{mode}")
        assert result.plan.settings.mode == (mode or "sequential")
        assert set(tensors) == set(truth)
        for key, tensor in truth.items():
            assert relative_error(tensors[key], tensor.double()) < 2e-5 or not tensor.any(), f"{mode}: {key}"
        left = {m for m in result.plan.linear if m not in solved(result)}
        assert all(UNREACHED.get(name, "nothing") in m for m in left), f"{mode}: {left}"
        assert len(solved(result)) >= 4


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ROUTED | NARROW])
def test_two_experts_agree_with_the_formula(name: str, tmp_path: Path) -> None:
    """The walk of whole models in float64, every module aimed at its own output; the residual stream is tested elsewhere."""
    architecture = ARCHITECTURES[name]
    base, experts, raw = saved(architecture, tmp_path, equal=False)
    for model in (base, *experts):
        model.requires_grad_(False)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # others do not run in float64
    raw |= {"output_weights": "none", "sequential": {"target": "module"}}
    _, tensors = merged(raw, tmp_path / "out")
    batches = []
    for t in range(2):
        inputs = load_file(tmp_path / f"inputs-{t}.safetensors")
        batches.append([{k: v[i : i + 16] for k, v in inputs.items()} for i in range(0, SAMPLES, 16)])
    wide = [[{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in own] for own in batches]
    truth = reference_sequential(base, experts, wide, target="module", heads=heads(base))
    own = copy.deepcopy(base)
    own.load_state_dict(truth.state_dict())
    own.save_pretrained(tmp_path / "truth")
    change = load_file(tmp_path / "base" / "model.safetensors")
    for key, tensor in load_file(tmp_path / "truth" / "model.safetensors").items():
        # Against what fine-tuning changed: of the whole weight it would be a hundredth of that.
        error, size = (tensors[key].double() - tensor.double()).norm(), (tensor - change[key]).double().norm()
        assert error <= 2e-3 * size, key


def heads(model: nn.Module) -> set[str]:
    body, outputs = body_of(model), output_embeddings(model)
    inside = {id(m) for m in body.modules()}
    return {n for n, m in model.named_modules() if (id(m) not in inside) or m is outputs}

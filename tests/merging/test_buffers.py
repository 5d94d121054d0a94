"""Masks, positions, frequencies and counters are no weights: copied from the base, missing where they like, whatever they hold."""

from __future__ import annotations

import math

import pytest
import torch

import bmm_engine as bmm
from bmm_engine.errors import MissingTensorError
from bmm_engine.merging.accounting import loads_back
from tests.odd import changed, mean, people, tensors

MASK = torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32)
BUFFERS = {
    "gpt2": {
        **{f"transformer.h.{i}.attn.bias": MASK for i in (0, 1)},
        **{f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in (0, 1)},
    },
    "gpt2 as bits": {f"transformer.h.{i}.attn.bias": MASK.bool() for i in (0, 1)},
    "gpt2 infinite": {f"transformer.h.{i}.attn.bias": torch.where(MASK > 0, 0.0, -math.inf) for i in (0, 1)},
    "llama": {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(2) for i in (0, 1)},
    "llama today": {"model.rotary_emb.inv_freq": torch.rand(2)},
    "bert": {"bert.embeddings.position_ids": torch.arange(32)[None]},
    "bert as floats": {"bert.embeddings.position_ids": torch.arange(32.0)[None]},
    "gpt-neox": {
        "gpt_neox.layers.0.attention.bias": MASK,
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.rand(1),
    },
    "gemma2": {"model.embed_tokens.embed_scale": torch.tensor(4.0)},
}


EVERYWHERE = [(kind, "all") for kind in ("gpt2", "gpt2 infinite", "llama", "bert as floats")]


@pytest.mark.parametrize(
    ("kind", "who"), [*((kind, who) for kind in BUFFERS for who in ("base", "expert")), *EVERYWHERE]
)
def test_buffers_in_some_of_the_files(kind, who, tmp_path):
    held = BUFFERS[kind]
    _, _, path, paths = people(kind.split()[0], tmp_path)
    expected = bmm.merge(path, paths)
    for number, p in enumerate({"base": [path], "expert": [paths[0]], "all": [path, *paths]}[who]):
        changed(
            p,
            lambda t, number=number: t.update({n: v + number if v.is_floating_point() else v for n, v in held.items()}),
        )
    for options in ({}, {"anchor": "ties", "alpha": math.inf})[: 2 if who == "all" else 1]:
        result = bmm.merge(path, paths, output=tmp_path / f"out-{len(options)}", **options)
        summary = result.summary()
        assert not any(summary["left_out_of_experts"].values())
        found = tensors(result.path)
        assert loads_back(result.path) == ""
        own = held if who != "expert" else {}
        assert found.keys() == expected.tensors.keys() - result.plan.alignment.base.aliases.keys() | own.keys()
        for name, value in own.items():
            assert torch.equal(found[name], value)
        if not options:
            assert len(result.modules) == len(expected.modules)
            assert all(torch.equal(found[n], expected.tensors[n]) for n in found if n not in held)


def test_a_mask_of_infinities_fits_every_dtype(tmp_path):
    _, _, path, paths = people("gpt2", tmp_path)
    changed(path, lambda t: t.update(BUFFERS["gpt2 infinite"]))
    for dtype in (torch.float16, torch.bfloat16):
        found = bmm.merge(path, paths, alpha=math.inf, dtype=dtype).tensors
        assert torch.equal(
            found["transformer.h.0.attn.bias"], BUFFERS["gpt2 infinite"]["transformer.h.0.attn.bias"].to(dtype)
        )


def test_bare_files_and_modules_of_ones_own():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)
            self.register_buffer("shape_of_things", torch.full((3, 3), -math.inf))

    models = [Own() for _ in range(3)]
    found = bmm.merge(models[0], models[1:], alpha=math.inf).tensors
    assert torch.equal(found["shape_of_things"], models[0].shape_of_things)
    states = [{"layer.weight": torch.randn(3, 3), "attn.bias": torch.where(MASK > 0, 0.0, -math.inf)} for _ in range(3)]
    found = bmm.merge(states[0], states[1:], alpha=math.inf).tensors
    assert torch.equal(found["attn.bias"], states[0]["attn.bias"])
    torch.testing.assert_close(found["layer.weight"].double(), mean("layer.weight", *states[1:]), rtol=0, atol=2e-7)


def test_a_bias_that_is_no_mask_is_merged():
    states = [{"attn.bias": torch.randn(4), "w.weight": torch.randn(2, 4)} for _ in range(3)]
    found = bmm.merge(states[0], states[1:], alpha=math.inf).tensors
    torch.testing.assert_close(found["attn.bias"].double(), mean("attn.bias", *states[1:]), rtol=0, atol=2e-7)


def test_running_statistics_are_merged_and_missed(tmp_path):
    _, _, path, paths = people("resnet", tmp_path)
    name = "resnet.embedder.embedder.normalization.running_mean"
    for number, p in enumerate(paths):
        changed(p, lambda t, number=number: t.update({name: torch.full((8,), number + 1.0)}))
    result = bmm.merge(path, paths, alpha=math.inf)
    assert torch.equal(result.tensors[name], torch.full((8,), 1.5))
    assert all(n.endswith("num_batches_tracked") for n in result.plan.alignment.buffers)
    changed(paths[0], lambda t: [t.pop(n) for n in list(t) if n.endswith("num_batches_tracked")])
    assert torch.equal(bmm.merge(path, paths, alpha=math.inf).tensors[name], result.tensors[name])
    changed(paths[0], lambda t: t.pop(name))
    with pytest.raises(MissingTensorError, match=r"running_mean.*incomplete"):
        bmm.plan_merge(path, paths, alpha=math.inf)

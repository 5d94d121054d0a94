"""Quantised models are refused by name, with the remedy: as base, as expert, under an adapter, from files and from Python."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

import bmm_engine as bmm
from bmm_engine.checkpoint import StateDictSource
from bmm_engine.checkpoint.quantised import refuse_quantised
from bmm_engine.errors import BmmError, CheckpointError
from bmm_engine.pipeline.inspection import describe_checkpoint
from tests.odd import changed, people, tensors

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def ints(*shape, dtype=torch.int32):
    return torch.zeros(*shape, dtype=dtype)


def _packed(**parts):
    """The weight gives way to parts of the module."""

    def change(held):
        held.pop(WEIGHT)
        held.update({f"{MODULE}.{name}": tensor for name, tensor in parts.items()})

    return change


def _beside(weight, **parts):
    def change(held):
        held[WEIGHT] = weight
        held.update({f"{MODULE}.{name}": tensor for name, tensor in parts.items()})

    return change


KINDS = {
    "GPTQ": (
        _packed(qweight=ints(2, 16), qzeros=ints(1, 2), scales=torch.ones(1, 16), g_idx=ints(16)),
        {"quant_method": "gptq", "bits": 4},
    ),
    "AWQ": (_packed(qweight=ints(16, 2), qzeros=ints(1, 2), scales=torch.ones(1, 16)), {"quant_method": "awq"}),
    "GPTQ or AWQ": (_packed(qweight=ints(16, 2), qzeros=ints(1, 2), scales=torch.ones(1, 16)), None),
    "bitsandbytes": (
        _beside(
            ints(128, 1, dtype=torch.uint8),
            **{
                "weight.absmax": torch.ones(4),
                "weight.quant_map": torch.ones(16),
                "weight.quant_state.bitsandbytes__nf4": ints(90, dtype=torch.uint8),
            },
        ),
        {"load_in_4bit": True},
    ),
    "bitsandbytes, eight bits": (
        _beside(ints(16, 16, dtype=torch.int8), SCB=torch.ones(16)),
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ),
    "FP8": (
        _beside(torch.zeros(16, 16).to(torch.float8_e4m3fn), weight_scale_inv=torch.ones(1, 1)),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "FP8 with block scales": (_beside(torch.zeros(16, 16).to(torch.float8_e4m3fn), weight_scale_inv=torch.ones(1, 1)), None),
    "FP8, scaled": (_beside(torch.zeros(16, 16).to(torch.float8_e4m3fn), weight_scale=torch.ones(1), input_scale=torch.ones(1)), None),
    "FP8, bare": (_beside(torch.zeros(16, 16).to(torch.float8_e5m2)), None),
    "compressed-tensors": (
        _packed(weight_packed=ints(16, 2), weight_scale=torch.ones(16, 1), weight_shape=torch.tensor([16, 16])),
        {"quant_method": "compressed-tensors"},
    ),
    "scaled integers": (_beside(ints(16, 16, dtype=torch.int8), weight_scale=torch.ones(16, 1)), None),
    "HQQ": (_packed(W_q=ints(8, 16, dtype=torch.uint8), meta=torch.ones(3)), None),
    "quanto": (_packed(**{"weight._data": ints(16, 16, dtype=torch.int8), "weight._scale": torch.ones(16, 1)}), None),
    "MXFP4": (
        lambda held: held.update(
            {f"{EXPERTS}_blocks": ints(2, 4, 4, dtype=torch.uint8), f"{EXPERTS}_scales": ints(2, 4, dtype=torch.uint8)}
        ),
        {"quant_method": "mxfp4"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_in_each_place(kind, tmp_path):
    change, said = KINDS[kind]
    method = kind.split(",")[0].replace("scaled integers", "(integer weights|scaled integers)")
    _, _, path, paths = people("llama", tmp_path)
    good = tensors(paths[0])
    bad = changed(paths[1], change, **({} if said is None else {"quantization_config": said}))
    for base, experts in ((path, [paths[0], bad]), (bad, [path, paths[0]]), (good, [good, tensors(bad)])):
        with pytest.raises(
            CheckpointError, match=rf"is quantised \(.*{method if base is not good else ''}.*original floating-point"
        ) as error:
            bmm.merge(base, experts, alpha=math.inf)
        assert str(bad) in str(error.value) or base is good
        assert len(str(error.value)) <= 1500
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = "base_model.model.model.layers.1.mlp.up_proj"
    save_file(
        {f"{stem}.lora_A.weight": torch.ones(2, 16), f"{stem}.lora_B.weight": torch.ones(40, 2)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}'
    )
    with pytest.raises(CheckpointError, match=r"is quantised \("):
        bmm.merge(bad, [adapter])


def test_the_remedy_for_a_config_that_is_left_over(tmp_path):
    _, _, path, paths = people("llama", tmp_path)
    expected = bmm.merge(path, paths).tensors
    for who in (path, paths[0]):
        changed(who, quantization_config={"quant_method": "gptq", "bits": 4})
        with pytest.raises(
            CheckpointError, match=r"quantization_config \(GPTQ\).* take quantization_config out of its config\.json"
        ):
            bmm.merge(path, paths)
        changed(who, quantization_config=None)
    found = bmm.merge(path, paths).tensors
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inspect_says_it(tmp_path):
    _, _, path, paths = people("llama", tmp_path)
    change, said = KINDS["GPTQ"]
    changed(path, change, quantization_config=said)
    assert "is quantised (GPTQ)" in describe_checkpoint(str(path))["quantised"]
    assert describe_checkpoint(str(paths[0]))["quantised"] is None


def test_integers_in_a_weight_alone():
    for dtype in (torch.int8, torch.uint8, torch.int32):
        with pytest.raises(CheckpointError, match=rf"\(integer weights\): 'q\.weight'.*{dtype}"):
            bmm.merge({"q.weight": ints(4, 4, dtype=dtype)}, [{"q.weight": torch.zeros(4, 4)}], alpha=math.inf)
        with pytest.raises(BmmError, match=rf"q\.weight.*{dtype}.*original floating-point"):
            bmm.merge({"q.weight": torch.zeros(4, 4)}, [{"q.weight": ints(4, 4, dtype=dtype)}], alpha=math.inf)


@pytest.mark.parametrize(
    "name",
    [
        "logit_scale",
        "layer_scale1.lambda1",
        "attn.k_scale",
        "embeddings.position_ids",
        "quantizer.codebooks",
        "input_scale",
    ],
)
def test_names_that_only_sound_like_it(name):
    refuse_quantised(StateDictSource({name: torch.ones(2, 2), "w.weight": torch.ones(2, 2)}))
    refuse_quantised(StateDictSource({"position_ids": torch.arange(4)[None], "w.weight": torch.ones(2, 2)}))

"""What an architecture calls its tensors, in every layout and there alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bmm_engine.models.buffers import looks_constant
from bmm_engine.models.names import leading_parts, modern_name, unwrapped
from bmm_engine.models.naming import Naming, checkpoint_names, inner_model
from tests.odd import MODELS
from tests.tiny import CONFIGS, make_base


def built(family):
    with torch.device("meta"):
        return make_base(family) if family in CONFIGS else MODELS[family]()


@pytest.mark.parametrize("family", [*CONFIGS, *MODELS])
def test_every_layout_leads_to_the_live_names(family):
    model = built(family)
    naming = Naming.of(model)
    assert naming.live == tuple(model.state_dict())
    for put in ("", "_orig_mod.", "module.", "module._orig_mod.", "net.model.", "a.b.c."):
        assert naming.known(put + n for n in naming.live) == {put + n: n for n in naming.live}
        files = {put + saved: live for live, saved in naming.saved.items()}
        assert naming.known(files) == files
    prefix = f"{model.base_model_prefix}."
    bare = {n.removeprefix(prefix): n for n in naming.live if n.startswith(prefix)}
    assert naming.known(bare).items() >= {k: v for k, v in bare.items() if k not in naming.live}.items()
    inside = {live.replace(".layers.", ".layers.module."): live for live in naming.live}
    assert naming.known(inside) == inside


def test_ties_and_buffers():
    assert Naming.of(built("t5")).ties == {
        name: "shared.weight"
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    }
    assert Naming.of(built("untied llama")).ties == {}
    assert Naming.of(built("gemma2")).ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "model.rotary_emb.inv_freq" in Naming.of(built("llama")).buffers
    assert "model.rotary_emb.inv_freq" not in Naming.of(built("llama")).stored
    assert checkpoint_names(built("tied gpt-neox"))["lm_head.weight"] == "embed_out.weight"


def test_names_that_mean_nothing_are_not_known():
    naming = Naming.of(built("bert"))
    assert naming.known(["other.weight", "bert.encoder.layer.9.output.dense.weight"]) == {}
    # One name among others that would be known with a part less is another tensor.
    assert set(naming.known([*naming.live[:5], "ema.bert.pooler.dense.bias"])) == set(naming.live[:5])
    # Two names of one tensor: the first is it.
    both = ["bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"]
    assert naming.known(both) == {both[0]: both[1]}


def test_a_module_of_ones_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    naming = Naming.of(nn.DataParallel(model))
    assert naming.live == (
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    )
    assert naming.known(["module.0.weight", "module.1.bias", "1.weight"]) == {
        "module.0.weight": "0.weight",
        "module.1.bias": "1.bias",
        "1.weight": "1.weight",
    }
    assert naming.known(["other.0.weight", "1.bias", "1.weight"]) == {"1.bias": "1.bias", "1.weight": "1.weight"}
    assert naming.linear == {"0.weight"}
    assert inner_model(nn.DataParallel(model)) == (model, "module.")
    assert inner_model(model) == (model, "")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.a._orig_mod._fsdp_wrapped_module.b.weight", "a.b.weight"),
        ("layer._checkpoint_wrapped_module.w", "layer.w"),
        ("my_orig_mod.w", "my_orig_mod.w"),
        ("conv.weight_g", "conv.parametrizations.weight.original0"),
        ("conv.weight_v", "conv.parametrizations.weight.original1"),
        ("LayerNorm.gamma", "LayerNorm.weight"),
        ("gamma", "gamma"),
    ],
)
def test_plain_names(name, plain):
    assert modern_name(name) == plain
    assert modern_name(plain) == plain
    assert unwrapped(plain) == plain


def test_leading_parts():
    assert leading_parts(["a.b.c.d.w", "a.0.w", "0.x.w"]) == ["0.", "a.", "0.x.", "a.b.", "a.b.c."]


@pytest.mark.parametrize(
    ("name", "shape", "constant"),
    [
        ("h.0.attn.bias", (1, 1, 8, 8), True),
        ("h.0.attn.bias", (8,), False),
        ("h.0.attn.bias", (8, 8), False),
        ("h.0.attn.masked_bias", (), True),
        ("layers.0.rotary_emb.inv_freq", (4,), True),
        ("embeddings.position_ids", (1, 8), True),
        ("embeddings.position_embeddings.weight", (8, 4), False),
        ("embeddings.mask_token", (1, 1, 4), False),
        ("causal_mask", (8, 8), True),
        ("norm.running_mean", (8,), False),
    ],
)
def test_what_looks_like_a_buffer(name, shape, constant):
    assert looks_constant(name, shape) is constant
